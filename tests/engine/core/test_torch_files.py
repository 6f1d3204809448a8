import io
import pickle

import pytest
import torch

from cocomix.core.torch_files import DamagedArchive, load_tensors


@pytest.fixture
def path(tmp_path):
    torch.save({"a": torch.arange(1000.0), "b": "text"}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_tensors_come_back(path):
    loaded = load_tensors(path)
    assert torch.equal(loaded["a"], torch.arange(1000.0)) and loaded["b"] == "text"


def test_no_bit_of_what_was_saved_changes_unnoticed(path):
    content = path.read_bytes()
    expected = load_tensors(path)
    for place in range(0, len(content), 13):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            loaded = load_tensors(path)
        except Exception:
            continue
        assert torch.equal(loaded["a"], expected["a"]) and loaded["b"] == "text"


def test_a_wrong_checksum_says_so(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedArchive, match="checksum"):
        load_tensors(path)


def test_files_from_before_archives_are_read(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensors(tmp_path / "old.pt")["a"], torch.ones(3))


def test_nothing_is_unpickled(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": print}, buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(tmp_path / "x.pt")
