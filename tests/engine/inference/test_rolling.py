"""Rolling perplexity against the harness, against one token at a time in fp64, and over all shapes of text."""

import gzip
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_helpers import SEQ_LEN, WORDS, World, environment
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.data import documents
from cocomix.inference import rolling
from cocomix.inference.evaluate import evaluate_checkpoint
from cocomix.inference.loading import load_usable
from cocomix.inference.rolling import RollingOptions, evaluate_texts, rolling_windows
from cocomix.model.config import CoCoMixConfig
from cocomix.model.model import CoCoMixForCausalLM

PREFIX = 0
_DRAW = random.Random(0)
PAGES = ["  the cat\n\n sleeps ", "fox", *(" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(1, 90))) for _ in range(12))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, random models that read all of their context (two CoCoMix ones, a plain one, a Llama), pages and a text.

    A few steps of training teach a model no more than how frequent tokens are."""
    world = World(tmp_path_factory.mktemp("world"))
    world.add_teacher()
    assert world.train("run") == 0
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 0}
    for mixing in ("interleave", "add", "none"):
        add_model(
            world,
            mixing,
            CoCoMixForCausalLM(
                CoCoMixConfig(
                    n_embd=32,
                    n_layer=2,
                    n_head=2,
                    n_positions=SEQ_LEN,
                    concept_dim=64,
                    concept_topk=4,
                    insert_layer=1,
                    mixing=mixing,
                    **sizes,
                )
            ),
        )
    add_model(
        world,
        "llama",
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=SEQ_LEN,
                **sizes,
            )
        ),
    )
    (world.folder / "pages.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in PAGES))
    (world.folder / "long.txt").write_text(" ".join(_DRAW.choices(WORDS, k=150)) + "\n")
    return world


def add_model(world, name, model):
    """A transformers folder with the world's tokenizer."""
    model.save_pretrained(world.folder / name)
    shutil.copytree(world.folder / "data/tokenizer", world.folder / name, dirs_exist_ok=True)


def options(world, *names, **settings):
    return RollingOptions(tuple(str(world.folder / name) for name in names or ("pages.jsonl",)), **settings)


def score(world, model, *names, **settings):
    (found,) = evaluate_texts([str(world.folder / model)], options(world, *names, **settings))
    return found


@torch.no_grad()
def one_at_a_time(usable, document, stride, seq_len):
    """Log-likelihood of a document, each token from a forward pass of its own in fp64, and the number of tokens."""
    model, ids = usable.model.double(), [PREFIX, *usable.tokenizer.encode(document)]
    total, n = 0.0, len(ids) - 1
    for target in range(1, n + 1):
        start = 0
        if target > seq_len:  # not in the first window: read what is there before the last token of its window
            start = min(n, seq_len + stride * math.ceil((target - seq_len) / stride)) - seq_len
        logits = model(torch.tensor([ids[start:target]]), use_cache=False).logits[0, -1]
        total += float(logits.log_softmax(-1)[ids[target]])
    return total, n


def expected(world, model, documents, stride=None, seq_len=SEQ_LEN):
    usable = load_usable(world.folder / model)
    found = [one_at_a_time(usable, document, stride or seq_len, seq_len) for document in documents]
    return sum(total for total, _ in found), sum(n for _, n in found)


# ---------------------------------------------------------------------------------------------- windows


def as_windows(windows):
    return [(window.ids.tolist(), window.n_scored) for window in windows]


def cut(ids, sizes):
    """Consecutive parts of ids."""
    return np.split(np.array(ids, dtype=np.int64), np.cumsum(sizes))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 12, 15, 16, 17, 24, 41])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_windows_are_those_of_the_harness_however_the_ids_come(n, stride):
    utils = pytest.importorskip("lm_eval.utils", reason="lm-evaluation-harness is not installed")
    ids = list(range(1, n + 1))
    theirs = utils.get_rolling_token_windows(ids, PREFIX, 8, 8 - stride + 1)
    wanted = [(context + predicted, len(predicted)) for context, predicted in map(utils.make_disjoint_window, theirs)]
    for sizes in ([], [1], [8], [9, 0, 1], [3] * 10, [1] * 40):
        assert as_windows(rolling_windows(cut(ids, sizes), PREFIX, 8, stride)) == wanted


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_every_token_is_scored_once_and_the_last_stride_of_a_window_count(n, stride):
    windows = list(rolling_windows([np.arange(1, n + 1)], PREFIX, 16, stride))
    assert np.concatenate([ids[-n_scored:] for ids, n_scored in windows]).tolist() == list(range(1, n + 1))
    assert all(window.n_scored == stride for window in windows[1:-1])
    assert all(len(window.ids) == 17 for window in windows[1:])
    assert windows[0].ids[0] == PREFIX and windows[0].n_scored == min(n, 16)


def test_an_empty_document_has_no_windows():
    assert list(rolling_windows([], PREFIX, 8, 8)) == list(rolling_windows([np.arange(0)], PREFIX, 8, 8)) == []


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("model", "stride"),
    [
        ("interleave", None),
        ("interleave", 5),
        ("none", 1),
        ("add", 5),
        ("none", None),
        ("llama", 15),
    ],
)
def test_scores_are_those_of_one_token_at_a_time(world, model, stride):
    found = score(world, model, stride=stride, batch=3)
    total, n = expected(world, model, PAGES, stride)
    assert found.log_likelihood == pytest.approx(total, rel=1e-5) and found.tokens == n
    assert found.words == sum(len(re.split(r"\s+", page)) for page in PAGES)
    assert found.bytes == sum(len(page.encode()) for page in PAGES) and found.documents == len(PAGES)
    assert found.token_perplexity == pytest.approx(math.exp(-total / n), rel=1e-4)
    assert found.word_perplexity == pytest.approx(math.exp(-total / found.words), rel=1e-4)
    assert found.byte_perplexity == pytest.approx(math.exp(-total / found.bytes), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(-total / found.bytes / math.log(2), rel=1e-5)


@pytest.mark.parametrize("model", ["interleave", "add", "none", "llama"])
def test_what_a_token_is_predicted_from_matters_to_these_models(world, model):
    """Else the tests above would not tell windows apart."""
    found = [score(world, model, stride=stride).log_likelihood for stride in (1, 5, 15, 16)]
    assert min(abs(one / other - 1) for one, other in itertools.combinations(found, 2)) > 1e-4  # tolerance: 1e-5


@pytest.mark.parametrize("model", ["interleave", "none"])
def test_scores_are_those_of_the_harness(world, model, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'cocomix[eval]'")
    from cocomix.inference.tasks import TaskOptions, evaluate_tasks

    (tmp_path / "wiki.yaml").write_text(f"""
task: wiki
dataset_path: json
dataset_kwargs: {{data_files: {{test: {world.folder}/pages.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
metadata: {{version: 1.0}}
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""")
    run = str(world.folder / model)
    (row,) = evaluate_tasks([run], TaskOptions(("wiki",), str(tmp_path), out=str(tmp_path / "results")))
    found = score(world, model)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert getattr(found, name) == pytest.approx(row[f"wiki {name}"][0], rel=1e-5)


@pytest.mark.parametrize("stride", [None, 5])
def test_the_batch_changes_nothing(world, stride):
    found = [score(world, "interleave", batch=batch, stride=stride) for batch in (1, 2, 7, 1000)]
    assert all(other == replace(found[0], log_likelihood=other.log_likelihood) for other in found)
    assert [other.log_likelihood for other in found] == pytest.approx([found[0].log_likelihood] * 4, rel=1e-6)


def test_windows_of_a_batch_are_about_as_long():
    windows = [rolling.Window(np.arange(n), 1) for n in (3, 17) * 40]
    batches = list(rolling._batches(iter(windows), 8))
    assert [len(batch) for batch in batches] == [8] * 10
    assert [{len(window.ids) for window in batch} for batch in batches] == [{3}] * 5 + [{17}] * 5


@pytest.mark.parametrize("stride", [None, 2])
def test_shorter_windows_than_the_context(world, stride):
    found = score(world, "interleave", "long.txt", seq_len=4, stride=stride)
    document = (world.folder / "long.txt").read_text()
    assert found.log_likelihood == pytest.approx(expected(world, "interleave", [document], stride, 4)[0], rel=1e-5)


@pytest.mark.parametrize("n", [1, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1])
def test_a_text_of_about_one_window(world, n, tmp_path, monkeypatch):
    tokenizer = load_usable(world.folder / "none").tokenizer
    document = tokenizer.decode(tokenizer.encode((world.folder / "long.txt").read_text())[:n])
    assert len(tokenizer.encode(document)) == n
    (tmp_path / "text.txt").write_text(document)
    lengths, original = [], rolling._log_likelihood
    monkeypatch.setattr(
        rolling,
        "_log_likelihood",
        lambda model, windows: (
            lengths.extend((len(ids) - 1, n_scored) for ids, n_scored in windows),
            original(model, windows),
        )[1],
    )
    found = score(world, "none", tmp_path / "text.txt")
    assert found.log_likelihood == pytest.approx(expected(world, "none", [document])[0], rel=1e-5)
    assert sorted(lengths) == sorted([(min(n, SEQ_LEN), min(n, SEQ_LEN))] + [(SEQ_LEN, 1)] * (n > SEQ_LEN))


def test_several_texts_are_summed_and_each_document_starts_anew(world, tmp_path):
    (tmp_path / "folder").mkdir()
    for number, page in enumerate(PAGES[:6]):
        (tmp_path / "folder" / f"{number}.txt").write_text(page)
    with gzip.open(tmp_path / "rest.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": page}) + "\n" for page in (*PAGES[6:], " \n"))  # white space: left out
    found = score(world, "add", tmp_path / "folder", tmp_path / "rest.jsonl.gz", text_key="body")
    together = score(world, "add")
    assert replace(found, log_likelihood=0) == replace(together, log_likelihood=0)
    assert found.log_likelihood == pytest.approx(together.log_likelihood, rel=1e-6)
    one = tmp_path / "one.txt"
    one.write_text(" ".join(PAGES))
    assert score(world, "add", one).log_likelihood != pytest.approx(together.log_likelihood, rel=1e-3)


@pytest.mark.parametrize("piece", [4, 7, 50])
def test_a_document_that_is_read_in_pieces(world, monkeypatch, tmp_path, piece):
    document = "\n the  cat \n\n\n sleeps\u2003under é tree" + "\t\x1f" * 9 + "and the\r\nfox   "
    (tmp_path / "text.txt").write_bytes(document.encode())
    whole = score(world, "none", tmp_path / "text.txt")
    assert whole.words == len(re.split(r"\s+", document)) and whole.bytes == len(document.encode())
    monkeypatch.setattr(documents, "PIECE_CHARS", piece)
    found = score(world, "none", tmp_path / "text.txt")
    assert (found.words, found.bytes, found.documents) == (whole.words, whole.bytes, 1)


def test_memory_does_not_grow_with_the_text(world, monkeypatch):
    """Neither with one large document nor with many small ones."""
    monkeypatch.setattr(rolling, "_log_likelihood", lambda model, windows: torch.zeros((), dtype=torch.float64))
    monkeypatch.setattr(documents, "PIECE_CHARS", 1 << 11)
    usable, line = load_usable(world.folder / "none"), "the quick brown fox runs \n" * 20

    def peak(documents):
        source = SimpleNamespace(parts=(), documents=lambda: documents)
        tracemalloc.start()
        rolling.rolling_score(usable, [source], SEQ_LEN, SEQ_LEN, 8)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    for of in (lambda n: iter([(line for _ in range(n))]), lambda n: ([line] for _ in range(n))):
        assert peak(of(500)) < 1.2 * peak(of(100))


# ---------------------------------------------------------------------------------------------- the command line


def test_a_line_for_each_checkpoint(world, capsys):
    step = next((world.folder / "run/checkpoints").glob("*08"))
    names = [str(world.folder / "run"), str(step), str(world.folder / "none")]
    texts = ["--text", str(world.folder / "pages.jsonl"), "--text", str(world.folder / "long.txt")]
    assert main(["eval", *names, *texts, "--stride", "8", "--batch", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = evaluate_texts(names, options(world, "pages.jsonl", "long.txt", stride=8, batch=5))
    assert len(lines) == 3 and found[0] != found[1]
    for name, line, wanted in zip(names, lines, found, strict=True):
        assert line == (
            f"{name}: perplexity {wanted.token_perplexity:.2f} by token, {wanted.word_perplexity:.6g} by word, "
            f"{wanted.byte_perplexity:.4f} by byte; {wanted.bits_per_byte:.4f} bits per byte ({wanted.tokens:,} "
            f"tokens, {wanted.words:,} words, {wanted.bytes:,} bytes, 15 documents; windows of 16 tokens, stride 8)"
        )
    assert main(["eval", names[0], *texts[2:]]) == 0
    assert capsys.readouterr().out.endswith("bytes, 1 document; windows of 16 tokens)\n")


def test_texts_of_every_kind_are_scored_alike_and_what_is_left_out_is_said_once(world, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    records = [{"text": page} for page in PAGES]
    (tmp_path / "corpus" / "pages.json.gz").write_bytes(gzip.compress(json.dumps(records).encode("utf-16")))
    (tmp_path / "corpus" / "photo.png").write_bytes(b"\x89PNG")
    names = [str(world.folder / "none"), str(world.folder / "run")]
    assert main(["eval", *names, "--text", str(tmp_path / "corpus")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert main(["eval", *names, "--text", str(world.folder / "pages.jsonl")]) == 0
    left_out = [line for line in said if line.startswith("left out of")]
    assert f"left out of {tmp_path}/corpus: 1 x image ({tmp_path}/corpus/photo.png)" in left_out
    assert [line for line in said if line not in left_out] == [
        line for line in capsys.readouterr().out.splitlines() if not line.startswith("left out of")
    ]
    (tmp_path / "bad.jsonl").write_text("{")
    assert main(["eval", names[0], "--text", str(tmp_path / "bad.jsonl")]) != 0
    shown = capsys.readouterr().err
    assert "bad.jsonl" in shown and "on_bad_record" not in shown


def test_help_tells_the_three_evaluations_apart(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = capsys.readouterr().out
    positions = [
        shown.index(heading)
        for heading in (
            "\ntoken files:",
            "--data FOLDER  ",
            "\ntexts:",
            "--stride N  ",
            "\nlm-evaluation-harness:",
            "--tasks NAME[,NAME...]\n",
        )
    ]
    assert positions == sorted(positions)


TEXT = ["--text", "OUT/long.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT/none", "--text", "OUT/nowhere.txt"], "error: --text: there is no file or folder OUT/nowhere.txt"),
        (["OUT/none", "--text", "OUT/blank.txt"], "OUT/blank.txt: there is no text in it"),
        (["OUT/none", *TEXT, "--text", "OUT/empty"], "there are no text files in OUT/empty"),
        (["OUT/none", "--text", "OUT/binary"], "is not UTF-8 text: convert it, or leave it out"),
        (
            ["OUT/none", "--text", "OUT/pages.jsonl", "--text-key", "body"],
            "its fields are text; name it with --text-key",
        ),
        (["OUT/text", *TEXT], "OUT/text holds no model"),
        (["OUT/none", "OUT/nowhere", *TEXT], "OUT/nowhere holds no model"),
        (["OUT/teacher", *TEXT], "OUT/teacher holds no tokenizer, which texts need"),
        (["OUT/mistaken", *TEXT], "holds a tokenizer of 300 ids, but its model was made for 50"),
        (["OUT/endless", *TEXT], "has no end-of-text token"),
        (["OUT/none", *TEXT, "--seq-len", "17"], "--seq-len is 17: this model takes windows of 1 to 16 tokens"),
        (["OUT/none", *TEXT, "--seq-len", "0"], "--seq-len is 0"),
        (["OUT/none", *TEXT, "--stride", "17"], "--stride is 17: expected 1 to 16"),
        (["OUT/none", *TEXT, "--stride", "0"], "--stride is 0"),
        (["OUT/none", *TEXT, "--stride", "5", "--seq-len", "4"], "--stride is 5: expected 1 to 4"),
        (["OUT/none", *TEXT, "--batch", "0"], "--batch is 0"),
        (["OUT/none", *TEXT, "--tasks", "wikitext"], "--text does not go with --tasks: leave one of the two out"),
        (["OUT/none", *TEXT, "--data", "OUT/data"], "--data does not go with --text"),
        (["OUT/none", *TEXT, "--windows", "3"], "--windows does not go with --text"),
        (["OUT/none", *TEXT, "--limit", "3"], "--limit does not go with --text"),
        (["OUT/none", *TEXT, "--shots", "0"], "--shots does not go with --text"),
        (["OUT/none", "--stride", "3"], "--stride goes with --text only"),
        (["OUT/none", "--text-key", "body"], "--text-key goes with --text only"),
        (["OUT/none", "--task-folder", "OUT"], "--task-folder goes with --tasks only"),
        (["OUT/none", "--tasks", "wikitext", "--windows", "3"], "--windows does not go with --tasks"),
        (["OUT/none", "--tasks", "wikitext", "--seq-len", "3"], "--seq-len does not go with --tasks"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(world, odd_ones, capsys, arguments, message):
    assert main(["eval", *(argument.replace("OUT", str(world.folder)) for argument in arguments)]) == 2
    out, error = capsys.readouterr()
    error = error.replace(str(world.folder), "OUT")
    assert error.startswith("cocomix eval: error: ") and message in error and not out
    assert len([line for line in error.splitlines() if line.strip()]) == 1


@pytest.fixture(scope="module")
def odd_ones(world):
    """What does not fit: texts without text, a tokenizer of another model, one without an end-of-text token."""
    (world.folder / "blank.txt").write_text(" \n\n")
    (world.folder / "empty").mkdir()
    (world.folder / "binary").write_bytes(b"\0\xff")
    tokenizer = world.folder / "data/tokenizer"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=SEQ_LEN, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(world.folder / "mistaken")
    shutil.copytree(tokenizer, world.folder / "mistaken", dirs_exist_ok=True)
    shutil.copytree(world.folder / "llama", world.folder / "endless")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("bos_token", "eos_token")}
    (world.folder / "endless/tokenizer_config.json").write_text(json.dumps(settings))
    (world.folder / "endless/cocomix_checksums.json").unlink()


def test_a_folder_named_data_is_a_text_like_any_other(world, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/page.txt").write_text(PAGES[2])
    monkeypatch.chdir(tmp_path)
    (found,) = evaluate_texts([str(world.folder / "none")], RollingOptions(("data",)))
    assert found.bytes == len(PAGES[2])


def test_texts_that_the_tokenizer_makes_no_tokens_of(world, monkeypatch):
    monkeypatch.setattr(rolling, "_encoded", lambda document, tokenizer, score: iter(()))
    with pytest.raises(CocomixError, match="makes no tokens of these texts"):
        score(world, "none")


def test_token_files_are_evaluated_as_before(world, capsys):
    assert main(["eval", str(world.folder / "run"), "--windows", "4", "--batch", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"perplexity {evaluate_checkpoint(world.folder / 'run', windows=4):.2f} " in shown


@pytest.mark.slow
def test_without_the_harness_and_in_a_process_of_its_own(world):
    code = "import sys; sys.modules['lm_eval'] = None; from cocomix.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "eval", str(world.folder / "none"), "--text", str(world.folder / "long.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(1))
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stdout + done.stderr
