import pytest
import torch
from safetensors.torch import save_file

from cocomix.core import output
from cocomix.core.errors import CocomixError
from cocomix.distributed.state_file import checksums_of, open_state_file, require_finite

TENSORS = {
    "wte.weight/master/0": torch.arange(300.0),
    "wte.weight/exp_avg/0": torch.zeros(300),
    "random/cpu": torch.arange(100, dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"save_id": "7"} | checksums_of(TENSORS))
    return tmp_path / "x.safetensors"


def read_all(path):
    with open_state_file(path, "7") as file:
        return {name: file.tensor(name) for name in TENSORS}


def test_tensors_come_back(path):
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read_all(path).items())
    with open_state_file(path, "7") as file:
        assert sorted(file.keys()) == sorted(TENSORS) and file.length("random/cpu") == 100


def test_no_bit_changes_unnoticed(path, capsys):
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            read = read_all(path)
        except CocomixError as error:
            assert str(path) in str(error)
            continue
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read.items())


def test_a_tensor_of_another_type_shape_or_name_is_not_the_same(path):
    first = TENSORS["wte.weight/master/0"]
    [expected] = checksums_of({"wte.weight/master/0": first}).values()
    for name, tensor in {
        "wte.weight/master/0": first.view(torch.int32),
        "wte.weight/master/300": first,
        "wpe.weight/master/0": first,
    }.items():
        assert [*checksums_of({name: tensor}).values()] != [expected]


def test_another_save_and_no_file_are_refused(path):
    with pytest.raises(CocomixError, match="belongs to another save"), open_state_file(path, "8"):
        pass
    with pytest.raises(CocomixError, match="is missing"), open_state_file(path.with_name("y"), "7"):
        pass


def test_a_file_of_an_earlier_version_is_read_and_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "_noted", set())
    save_file(TENSORS, tmp_path / "old", metadata={"save_id": "7"})
    for _ in range(2):
        assert torch.equal(read_all(tmp_path / "old")["random/cpu"], TENSORS["random/cpu"])
    assert capsys.readouterr().err.count("without checksums") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(value, tmp_path):
    broken = torch.zeros(100)
    broken[70] = value
    with pytest.raises(CocomixError, match=r"wpe\.weight/exp_avg/5 holds numbers that are not finite"):
        require_finite({**TENSORS, "wpe.weight/exp_avg/5": broken}, tmp_path / "x")
    require_finite({**TENSORS, "huge": torch.full((100,), 3e38)}, tmp_path / "x")  # the sum of which is not
