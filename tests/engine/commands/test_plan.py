import pytest
from command_helpers import assert_refused, call, record_call


def test_numbers_of_gpus_are_read_from_one_argument(world, monkeypatch):
    calls = record_call(monkeypatch, "cocomix.costs.plan_text.run")
    assert call(world, "plan", "--gpus", "8") == 0
    options = ["--cluster", "a100", "--vocab-size", "9", "--json", "f"]
    assert call(world, "plan", "--gpus=8,16", *options, "data.seq_len=8") == 0
    assert calls == [
        (world.load(), [8], "h100", None, None),
        (world.load("data.seq_len=8"), [8, 16], "a100", 9, "f"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus=8", "--cluster=v100"], "--cluster v100: there is no such file; known names: a100, h100, h200"),
        (["--gpus=3"], "train.global_batch (8) must be a multiple of train.micro_batch (4) x 3 GPUs"),
        (["--gpus=many"], "--gpus many: expected a number"),
        (["--gpus=8,"], "--gpus 8,: expected a number, or several with commas between them"),
        (["--gpus=2", "teacher.model=OUT/nobody"], "so its shape is unknown"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(world, capsys, arguments, message):
    assert_refused(world, capsys, "plan", arguments, message)
