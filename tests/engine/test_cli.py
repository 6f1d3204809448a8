import errno
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_helpers import call, one_line, world_of_teachers
from run_helpers import SEQ_LEN, World
from stored_json import change_json

from cocomix import commands
from cocomix.cli import COMMANDS, main
from cocomix.core.errors import CocomixError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of_teachers(tmp_path_factory.mktemp("world"))


# ---------------------------------------------------------------------------------------------- from text to report


def test_from_a_few_kilobytes_of_text_to_a_report(tmp_path, capsys):
    """Every command in the order of the quickstart, with what each leaves behind."""
    world = World(tmp_path)
    shutil.rmtree(tmp_path / "data")
    teacher = ["model.mixing=none", "train.run=OUT/teacher-run"]
    student = ["teacher.model=OUT/teacher-run/model", "concept_labels.cache=OUT/labels"]
    assert call(world, "data") == 0 and call(world, "data") == 0
    assert "is up to date" in capsys.readouterr().out
    assert call(world, "train", *teacher) == 0
    assert call(world, "sae", *student) == 0
    assert "explained variance" in capsys.readouterr().out
    assert call(world, "labels", *student) == 0
    assert "is complete" in capsys.readouterr().out
    assert call(world, "train", *student, "model.mixing=none", "train.run=OUT/ntp") == 0
    assert call(world, "train", *student, "train.run=OUT/mixed", "train.tensorboard=true") == 0
    assert call(world, "train", *student, "train.run=OUT/added", "model.mixing=add") == 0
    assert len(list((tmp_path / "mixed/tensorboard").glob("events.*"))) == 1
    out = capsys.readouterr()
    assert out.out.count("validation perplexity") == 3 and "model shards" not in out.err and "weights:" not in out.err
    assert main(["eval", str(tmp_path / "mixed")]) == 0
    assert f"perplexity {world.records('mixed', 'summary')[0]['perplexity']:.2f} " in capsys.readouterr().out
    runs = [str(tmp_path / name) for name in ("ntp", "mixed", "added")]
    assert main(["report", *runs, "--out", str(tmp_path / "report")]) == 0
    table = capsys.readouterr().out
    assert "CoCoMix (cached labels)" in table and "NTP" in table
    assert (tmp_path / "report/report.html").stat().st_size > 10_000
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_the_installed_command_trains_in_a_process_of_its_own(world):
    script = os.path.join(os.path.dirname(sys.executable), "cocomix")
    arguments = ["train", str(world.config), f"train.run={world.folder}/installed", "model.mixing=none"]
    done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith(f"{world.folder}/installed: validation perplexity ")
    assert all(text.startswith("installed: ") for text in done.stderr.splitlines()), done.stderr  # the bar, no warnings
    again = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and again.stdout == "" and again.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------- arguments


def test_every_command_is_listed_and_has_what_is_asked_of_it():
    files = {file.stem for file in Path(commands.__file__).parent.glob("*.py")} - {"__init__", "arguments"}
    assert sorted(COMMANDS) == sorted(files)
    for name in COMMANDS:
        command = importlib.import_module(f"cocomix.commands.{name}")
        assert command.SUMMARY and "\n" not in command.SUMMARY
        assert callable(command.add_arguments) and callable(command.run)


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=lambda command: " ".join(command))
def test_help_names_the_commands_and_their_arguments(command, capsys):
    with pytest.raises(SystemExit) as leave:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert leave.value.code == 0
    own = {"eval": ["checkpoint"], "export": ["OUT"], "report": ["RUN"], "generate": ["MODEL"], "concepts": ["MODEL"]}
    for name in COMMANDS if not command else own.get(command[0], ["CONFIG"]):
        assert name in text
    assert "local_rank" not in text


def test_a_reader_that_leaves_early_gets_no_traceback():
    command = f"{sys.executable} -m cocomix plan configs/openwebtext/69m.yaml --gpus 8 | true"
    root = Path(__file__).parents[2]
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_the_command_line_starts_without_heavy_imports():
    code = "import sys; from cocomix.cli import _parse; _parse(['data', 'c']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "deepspeed", "matplotlib", "numpy", "omegaconf"} & set(loaded)


@pytest.fixture
def parsed(monkeypatch):
    seen = []
    monkeypatch.setattr("cocomix.commands.train.run", seen.append)
    return seen


@pytest.mark.parametrize(
    "arguments",
    [
        ["c.yaml", "a.b=1", "c=2", "--resume"],
        ["c.yaml", "--resume", "a.b=1", "c=2"],
        ["--resume", "c.yaml", "a.b=1", "c=2"],
        ["c.yaml", "a.b=1", "--resume", "c=2"],
    ],
)
def test_overrides_may_stand_before_and_after_options(parsed, arguments):
    assert main(["train", *arguments]) == 0
    [options] = parsed
    assert (options.config, options.overrides, options.resume) == ("c.yaml", ["a.b=1", "c=2"], True)


@pytest.mark.parametrize("local_rank", [["--local_rank=1"], ["--local_rank", "1"]])
def test_the_deepspeed_launchers_argument_is_taken(parsed, local_rank):
    assert main([*local_rank, "train", "c.yaml", "--resume"]) == 0
    assert parsed[0].config == "c.yaml"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train"],
        ["train", "c.yaml", "--resum-e"],
        ["train", "c.yaml", "stray"],
        ["data", "c.yaml", "--resume"],
        ["eval", "run", "train.lr=1"],
        ["eval", "run", "--seq-len", "many"],
        ["report"],
        ["report", "run", "--nope"],
        ["plan", "c.yaml"],
        ["export", "run"],
        ["export", "run", "out", "a.b=1"],
        ["export", "run", "out", "--dtype", "fp8"],
    ],
)
def test_unknown_arguments_end_with_exit_code_2(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as leave:
        code = leave.code
    assert code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------- bad input


def test_a_missing_or_broken_config_is_one_line(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no config file at" in one_line(capsys, "train")
    (tmp_path / "broken.yaml").write_text("train: [1")
    assert main(["train", str(tmp_path / "broken.yaml")]) == 2
    assert re.search(r"/broken\.yaml, line \d, column \d+: this is not valid YAML: ", one_line(capsys, "train"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CocomixError("first\n  second\r\n\nthird\n"), "first; second; third"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "runs/a: Permission denied"),
        (
            OSError(errno.EROFS, "Read-only", "runs/.a.json.0123abcd.7.part"),
            "runs/a.json: Read-only",
        ),
        (OSError(errno.EROFS, "Read-only", b"a\nb"), "a; b: Read-only"),
    ],
)
def test_an_error_is_one_line_that_names_what_its_user_knows_of(monkeypatch, capsys, error, said):
    def failing(_):
        raise error

    monkeypatch.setattr("cocomix.commands.export.run", failing)
    assert main(["export", "run", "out"]) == 2
    assert one_line(capsys, "export") == f"cocomix export: error: {said}"


@pytest.mark.parametrize("name", ["two\nlines", "blank ", " 007", "1e3"])
def test_a_folder_is_called_what_it_was_named(world, tmp_path, name):
    assert call(world, "data", f"data.folder={tmp_path}/{name}/{name}") == 0
    assert os.listdir(tmp_path) == [name] and os.listdir(tmp_path / name) == [name]
    named = [f"data.folder={tmp_path}/{name}/{name}", f"train.run={tmp_path}/{name}/run{name}"]
    assert call(world, "train", *named, "model.mixing=none", "train.tokens=256") == 0
    assert main(["export", f"{tmp_path}/{name}/run{name}", f"{tmp_path}/{name}/out{name}"]) == 0
    assert sorted(os.listdir(tmp_path / name)) == sorted([name, f"out{name}", f"run{name}"])


def break_tokens(folder, kind):
    """Damage a copy of token files; what the message must say."""
    file, meta = folder / "train.bin", json.loads((folder / "meta.json").read_text())
    ids = np.fromfile(file, dtype="<u2")
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-3])
        return "an odd number for 2-byte tokens"
    if kind == "empty":
        file.write_bytes(b"")
        return "has 0 bytes"
    if kind == "short":
        ids = ids[: SEQ_LEN - 1]
        meta["splits"]["train"]["tokens"] = len(ids)
    else:
        ids[:] = meta["vocab_size"]
    ids.tofile(file)
    if kind != "changed":
        del meta["splits"]["train"]["sums"]  # as an earlier version made it
        change_json(folder / "meta.json", {"splits": meta["splits"]})
    problems = {"short": "fewer than one window", "changed": "is damaged: the checksum of bytes 0 to 65,535"}
    return problems.get(kind, "but the vocabulary has 300 ids")


@pytest.mark.parametrize("kind", ["truncated", "empty", "changed", "short", "foreign id"])
@pytest.mark.parametrize("command", ["train", "labels", "sae"])
def test_damaged_token_files_are_refused(world, tmp_path, capsys, command, kind):
    shutil.copytree(world.folder / "data", tmp_path / "data")
    message = break_tokens(tmp_path / "data", kind)
    overrides = [f"data.folder={tmp_path}/data", f"train.run={tmp_path}/run", f"concept_labels.cache={tmp_path}/cache"]
    overrides[2:] = overrides[2:] if command == "labels" else []
    overrides += [f"teacher.sae={tmp_path}/sae"] if command == "sae" else []
    assert call(world, command, *overrides) == 2
    assert message in one_line(capsys, command)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("labels-*.bin"))
    assert not (tmp_path / "sae").exists() and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("data", ["data.folder=NEW/data"]),
        ("labels", ["concept_labels.cache=NEW/cache"]),
        ("sae", ["teacher.sae=NEW/sae"]),
    ],
)
@pytest.mark.parametrize("when", ["seen before", "met while writing"])
def test_no_room_on_disk_is_one_line(world, tmp_path, capsys, monkeypatch, command, overrides, when):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "met while writing":
        monkeypatch.setattr("os.fsync", full)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert call(world, command, *(text.replace("NEW", str(tmp_path)) for text in overrides)) == 2
    assert "no room on disk" in one_line(capsys, command)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {
        "train.bin",
        "val.bin",
        "train.sums",
        "val.sums",
    }  # whole, and worth nothing without meta.json


# ---------------------------------------------------------------------------------------------- interruptions


def killed(function, at_call):
    """`function`, which sends SIGTERM to this process when it is called for the `at_call`th time."""
    calls = []

    def wrapped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize(
    ("command", "overrides", "target", "at_call"),
    [
        ("data", ["data.folder=NEW/data"], "cocomix.data.splitter.Splitter.__call__", 20),
        ("labels", ["concept_labels.cache=NEW/cache"], "cocomix.teacher.concept_teacher.ConceptTeacher.labels", 4),
        ("sae", ["teacher.sae=NEW/sae"], "cocomix.teacher.sae_training.train_step", 5),
    ],
)
def test_sigterm_leaves_no_half_written_file_and_the_command_can_be_run_again(
    world, tmp_path, capsys, monkeypatch, command, overrides, target, at_call
):
    overrides = [text.replace("NEW", str(tmp_path)) for text in overrides]
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # were the command's own missing, this process would live
    with monkeypatch.context() as patch:
        patch.setattr(target, killed(pkgutil.resolve_name(target), at_call))
        assert call(world, command, *overrides) == 130
    again = "starts again" if command == "data" else "continues from what is complete"
    assert f"interrupted; the same command {again}" in capsys.readouterr().err
    assert signal.signal(signal.SIGTERM, handler) == signal.SIG_IGN
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "data/meta.json").exists() and not (tmp_path / "sae").exists()
    assert call(world, command, *overrides) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "c.yaml"], "interrupted; with --resume it continues from its last checkpoint"),
        (["eval", "run"], "interrupted; with --tasks the same command continues from what is complete"),
        (["export", "run", "out"], "interrupted"),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, arguments, message):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cocomix.commands.{arguments[0]}.run", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"\ncocomix {arguments[0]}: {message}\n"


def test_the_command_line_works_outside_the_main_thread(world, capsys):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call, world, "data").result() == 0
    assert "is up to date" in capsys.readouterr().out
