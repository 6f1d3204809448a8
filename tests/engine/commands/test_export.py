from command_helpers import one_line

from cocomix.cli import main


def test_it_says_where_the_model_is(monkeypatch, capsys):
    monkeypatch.setattr("cocomix.distributed.export.export", lambda *arguments: arguments)
    assert main(["export", "run", "out"]) == 0
    assert main(["export", "run", "out", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the model is in ('run', 'out', 'fp32')",
        "the model is in ('run', 'out', 'bf16')",
    ]


def test_exporting_nothing_or_over_something_is_one_line(world, capsys):
    assert main(["export", str(world.folder / "text"), str(world.folder / "new")]) == 2
    assert "holds no model" in one_line(capsys, "export")
    assert main(["export", str(world.folder / "teacher"), str(world.folder / "text")]) == 2
    assert "exists already" in one_line(capsys, "export")
    assert not (world.folder / "new").exists()
