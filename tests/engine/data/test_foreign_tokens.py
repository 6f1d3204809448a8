"""Token files of other programs, written here as those programs write them."""

import struct

import numpy as np
import pytest
from data_helpers import story
from hypothesis import given, settings
from hypothesis import strategies as st

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.data import foreign_tokens
from cocomix.data.foreign_tokens import TokenSources
from cocomix.data.preparation import prepare
from cocomix.data.token_files import SPLITS, TokenFiles

EOT, VOCAB = 0, 400
CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}
LLMC = {"<u2": (20240520, 1), "<u4": (20240801, 7)}


def flat(path, documents, dtype="<u2", end=EOT):
    """nanoGPT's and OLMo-core's: every document and the end-of-text token."""
    np.array([token for document in documents for token in [*document, end]], dtype).tofile(path)
    return path


def llmc(path, documents, dtype="<u2"):
    """llm.c's: a header, and the end-of-text token before every document."""
    ids = np.array([token for document in documents for token in [EOT, *document]], dtype)
    header = np.zeros(256, "<i4")
    header[:3] = [*LLMC[dtype], len(ids)]
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


def npy(path, documents, dtype="<i8"):
    np.save(path, np.array([token for document in documents for token in [*document, EOT]], dtype))
    return path


def megatron(path, documents, dtype="<i4", append_eod=False, sequences=1, modes=False):
    """Megatron's: tokens, and beside them an index of sequences and documents; a document may have several."""
    lengths, first_sequences, tokens = [], [0], []
    for document in documents:
        ids = [*document, *[EOT] * append_eod]
        lengths += [len(part) for part in np.array_split(np.array(ids), sequences)]
        first_sequences.append(len(lengths))
        tokens += ids
    width = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths) - lengths) * width if lengths else []
    np.array(tokens, dtype).tofile(path)
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(first_sequences))
        + np.array(lengths, "<i4").tobytes()
        + np.array(pointers, "<i8").tobytes()
        + np.array(first_sequences, "<i8").tobytes()
        + bytes(len(lengths) * modes)
    )
    return path


def read(*paths, vocab_size=VOCAB) -> list[list[int]]:
    """All documents, without the end-of-text token that each must have and have once."""
    found = {}
    for piece in TokenSources([str(path) for path in paths], vocab_size).pieces(EOT):
        found.setdefault(piece.document, []).extend(piece.ids.tolist())
        assert piece.last == (piece.ids[-1] == EOT)
    assert list(found) == list(range(len(found)))
    assert all(ids[-1] == EOT and EOT not in ids[:-1] for ids in found.values())
    return [ids[:-1] for ids in found.values()]


DOCUMENTS = [[5, 6, 7], [8], [9, 10, 399, 12, 13], list(range(1, 200))]


@pytest.mark.parametrize(
    "write, options",
    [
        (flat, {}),
        (flat, {"dtype": "<u4"}),
        (llmc, {}),
        (llmc, {"dtype": "<u4"}),
        (npy, {}),
        (npy, {"dtype": ">u2"}),
        (megatron, {}),
        (megatron, {"dtype": "<u2", "append_eod": True}),
        (megatron, {"dtype": "<i8", "sequences": 3}),
        (megatron, {"dtype": "<i2", "append_eod": True, "sequences": 2, "modes": True}),
    ],
)
@pytest.mark.parametrize("read_tokens", [3, 1 << 20])
def test_documents_come_out_as_they_went_in(tmp_path, monkeypatch, write, options, read_tokens):
    monkeypatch.setattr(foreign_tokens, "_READ_TOKENS", read_tokens)
    path = write(tmp_path / f"tokens.{'npy' if write is npy else 'bin'}", DOCUMENTS, **options)
    assert read(path) == DOCUMENTS


_IDS = st.lists(st.integers(1, VOCAB - 1), max_size=9)


@given(documents=st.lists(_IDS, min_size=1, max_size=8), sequences=st.integers(1, 3), eod=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_documents_come_out_of_megatrons_files(tmp_path_factory, documents, sequences, eod):
    path = tmp_path_factory.mktemp("megatron") / "tokens.bin"
    documents = [[7], *documents]
    megatron(path, documents, append_eod=eod, sequences=sequences)
    assert read(path) == [document for document in documents if document]


@given(documents=st.lists(_IDS, min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_documents_come_out_of_flat_files_without_the_empty_ones(tmp_path_factory, documents):
    path = flat(tmp_path_factory.mktemp("flat") / "tokens.bin", [[7], *documents])
    assert read(path) == [[7], *[document for document in documents if document]]


def test_a_last_document_without_an_end_gets_one(tmp_path):
    np.array([5, 6, EOT, 7, 8], "<u2").tofile(tmp_path / "a.bin")
    flat(tmp_path / "b.bin", [[9]])
    assert read(tmp_path / "a.bin", tmp_path / "b.bin") == [[5, 6], [7, 8], [9]]


def test_large_vocabularies_are_read_as_32_bits(tmp_path):
    path = flat(tmp_path / "tokens.bin", [[5, 70_000], [6]], dtype="<u4")
    assert read(path, vocab_size=70_001) == [[5, 70_000], [6]]


@pytest.fixture
def given_tokens(config, tmp_path):
    """Token files of the stories, with a tokenizer, and a config that takes tokens."""
    made = prepare(config)
    tokens = [made.tokenizer()(story(number), add_special_tokens=False)["input_ids"] for number in range(60)]
    folder = str(tmp_path / "from-tokens")
    return (
        made,
        tokens,
        lambda *names: DataConfig(
            folder=folder,
            tokens=[str(name) for name in names],
            tokenizer=str(made.folder / "tokenizer"),
            val_fraction=0.2,
        ),
    )


def test_given_tokens_become_the_same_documents_as_their_text(given_tokens, tmp_path, capsys):
    made, tokens, config_of = given_tokens
    path = flat(tmp_path / "stories.bin", tokens)
    files = prepare(config_of(path))
    assert f"{path}: {path.stat().st_size // 2:,} tokens as uint16" in capsys.readouterr().out
    assert sorted(documents_in(files)) == sorted(tokens) and files.vocab_size == made.vocab_size
    assert sum(record.documents for record in files.meta.splits.values()) == 60
    for name in SPLITS:
        files.split(name).verify()
    assert prepare(config_of(path)).meta == files.meta  # is up to date
    assert TokenFiles.open(files.folder).meta.settings["tokens"] == [str(path)]


def documents_in(files) -> list[list[int]]:
    ids = [int(token) for name in SPLITS for token in files.split(name).tokens]
    ends = [place for place, token in enumerate(ids) if token == files.eot_id]
    return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


@pytest.mark.parametrize("names", [("train.bin", "val.bin"), ("web_train_000001.bin", "web_val_000000.bin")])
def test_names_say_what_is_for_training_and_what_for_validation(given_tokens, tmp_path, names):
    _, tokens, config_of = given_tokens
    folder = tmp_path / "given"
    folder.mkdir()
    flat(folder / names[0], tokens[:40])
    llmc(folder / names[1], tokens[40:])
    files = prepare(config_of(folder))
    assert documents_in(files) == tokens
    assert [files.meta.splits[name].documents for name in SPLITS] == [40, 20]


def test_max_tokens_of_files_that_say_their_side_is_refused(given_tokens, tmp_path):
    _, tokens, config_of = given_tokens
    config = config_of(flat(tmp_path / "train.bin", tokens[:40]), flat(tmp_path / "val.bin", tokens[40:]))
    config.max_tokens = 500  # which the training files alone would pass long before validation begins
    with pytest.raises(CocomixError, match="data.max_tokens would cut off validation"):
        prepare(config)


def test_max_tokens_and_left_out_files_are_said(given_tokens, tmp_path, capsys):
    _, tokens, config_of = given_tokens
    folder = tmp_path / "given"
    folder.mkdir()
    megatron(folder / "text_document.bin", tokens)
    (folder / "meta.pkl").write_bytes(b"x")
    config = config_of(folder)
    config.max_tokens = 500
    files = prepare(config)
    assert 500 <= sum(files.split(name).n_tokens for name in SPLITS) < 500 + len(max(tokens, key=len)) + 1
    out = capsys.readouterr().out
    assert "60 documents by its index" in out and "1 x not a token file (.bin or .npy)" in out and "meta.pkl" in out


def test_other_tokens_under_the_same_name_are_something_else(given_tokens, tmp_path):
    _, tokens, config_of = given_tokens
    path = flat(tmp_path / "stories.bin", tokens)
    prepare(config_of(path))
    flat(path, tokens[:50])
    with pytest.raises(CocomixError, match=r"was made from something else: the text changed: .*stories\.bin"):
        prepare(config_of(path))


def broken_index(path, change):
    megatron(path, DOCUMENTS)
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    change(content)
    index.write_bytes(content)
    return path


BAD = {
    "there is no file or folder": lambda at: at / "nowhere.bin",
    "there are no token files": lambda at: (at / "empty").mkdir() or at / "empty",
    "holds text: name text as data.text": lambda at: (at / "a.bin").write_text("Once upon a time\n") and at / "a.bin",
    "holds nothing": lambda at: (at / "a.bin").write_bytes(b"") or at / "a.bin",
    "is packed: unpack it": lambda at: (at / "a.bin").write_bytes(b"\x1f\x8b" + bytes(90)) and at / "a.bin",
    "expected a whole number of them": lambda at: (at / "a.bin").write_bytes(b"\1" * 7) and at / "a.bin",
    "token 4 has id 400, but data.tokenizer has 400 ids": lambda at: flat(at / "a.bin", [[1, 2, 3], [400]]),
    "token 1 has id -1": lambda at: megatron(at / "a.bin", [[1, -1]]),
    "validation tokens alone": lambda at: flat(at / "val.bin", DOCUMENTS),
    "is an index: name the .bin file": lambda at: megatron(at / "a.bin", DOCUMENTS).with_suffix(".idx"),
    "no index of Megatron's": lambda at: broken_index(at / "a.bin", lambda content: content.__setitem__(0, 0)),
    "Megatron's older form": lambda at: broken_index(
        at / "a.bin", lambda content: content.__setitem__(slice(0, 8), b"TNTIDX\0\0")
    ),
    "expected 122: it is damaged": lambda at: broken_index(at / "a.bin", lambda content: content.pop()),
    "sequences do not follow": lambda at: broken_index(
        at / "a.bin", lambda content: content.__setitem__(34 + 16 + 8, 1)
    ),
    "documents do not follow": lambda at: broken_index(
        at / "a.bin", lambda content: content.__setitem__(34 + 16 + 32, 1)
    ),
    "an array of float64": lambda at: np.save(at / "a.npy", np.zeros(3)) or at / "a.npy",
    "with 2 dimensions": lambda at: np.save(at / "a.npy", np.zeros((2, 2), int)) or at / "a.npy",
}


@pytest.mark.parametrize("message", list(BAD))
def test_what_is_no_token_file_is_named(tmp_path, message):
    path = BAD[message](tmp_path)
    with pytest.raises(CocomixError) as error:
        read(path)
    assert message in str(error.value) and str(path.parent) in str(error.value)
    assert "\n" not in str(error.value)


def test_tokens_and_text_are_never_taken_for_one_another(given_tokens, tmp_path, config):
    made, tokens, config_of = given_tokens
    given = config_of(flat(tmp_path / "a.bin", tokens))
    given.folder = config.folder
    with pytest.raises(CocomixError, match=r"was made from something else: .*data\.tokens was None and is \["):
        prepare(given)
    files = prepare(config_of(tmp_path / "a.bin"))
    config.folder = str(files.folder)
    with pytest.raises(CocomixError, match=r"was made from something else: .*data\.text was None and is \["):
        prepare(config)


def test_tokens_cut_short_are_noticed(tmp_path):
    path = llmc(tmp_path / "a.bin", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CocomixError, match="it is damaged, or no token file"):
        read(path)
    path = megatron(tmp_path / "b.bin", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CocomixError, match="it is damaged, or no token file"):
        read(path)


@pytest.mark.parametrize(
    "settings, message",
    [({"text": ["stdlib"]}, "data.text are both set"), ({"tokenizer": None}, "data.tokens needs data.tokenizer")],
)
def test_tokens_need_their_tokenizer_and_no_text(given_tokens, tmp_path, settings, message):
    _, tokens, config_of = given_tokens
    config = config_of(flat(tmp_path / "a.bin", tokens))
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(CocomixError, match=message):
        prepare(config)
    assert not (tmp_path / "from-tokens").exists()
