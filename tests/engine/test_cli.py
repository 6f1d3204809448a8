import errno
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_helpers import SEQ_LEN, World

from cocomix import cli
from cocomix.cli import main

COMMANDS = ("data", "train", "sae", "labels", "plan", "profile", "generate", "concepts", "export", "eval", "report")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.add_teacher()
    world.add_teacher("teacher-wide", "sae-wide", width=48)
    return world


def call(world, command, *overrides):
    """A command with the world's config in this process; its exit code."""
    return main([command, str(world.config), *(text.replace("OUT", str(world.folder)) for text in overrides)])


def one_line(capsys, command):
    """The message on standard error, which must be a single line without a traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "|" not in line]  # |: bars
    assert len(lines) == 1 and lines[0].startswith(f"cocomix {command}: error: "), lines
    return lines[0]


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
    assert not {"torch", "transformers", "deepspeed", "matplotlib"} & set(loaded)


@pytest.fixture
def parsed(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_train", lambda options: seen.append(options))
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


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("train", ["train.learning_rate=1"], "unknown key train.learning_rate"),
        ("train", ["trian.lr=1"], "did you mean train?"),
        ("train", ["train.lr=fast"], "train.lr"),
        ("train", ["train=3"], "train is a section"),
        ("train", ["model.insert_layer=3"], "model.insert_layer (3) must be at least 0 and below model.n_layer (3)"),
        ("train", ["model.concept_topk=65"], "model.concept_topk (65) must be "),
        (
            "train",
            ["train.precision=bf16", "train.zero_stage=0"],
            "train.precision=bf16 needs train.zero_stage 1, 2 or 3",
        ),
        ("train", ["train.zero_stage=4"], "train.zero_stage is 4; it must be 0, 1, 2 or 3"),
        ("train", ["deepspeed.gradient_clipping=1"], "deepspeed.gradient_clipping is filled in from train.grad_clip"),
        ("train", ["data.folder=OUT/nowhere"], "is missing"),
        ("train", ["data.seq_len=100000"], "fewer than one window"),
        ("train", ["teacher.sae=OUT/sae-wide"], "it was trained on another model"),
        ("train", ["teacher.sae=OUT/nothing"], "no SAE at"),
        ("train", ["teacher.layer=2"], "the teacher has blocks 0 to 1"),
        ("train", ["concept_labels.cache=OUT/nowhere"], "the label cache"),
        ("train", ["train.run=OUT/config.yaml", "model.mixing=none"], "File exists"),
        ("labels", [], "concept_labels.cache is not set"),
        ("labels", ["concept_labels.cache=OUT/new", "teacher.sae=OUT/sae-wide"], "it was trained on another model"),
        ("labels", ["concept_labels.cache=OUT/new", "teacher.model=OUT/nobody"], "cannot load"),
        ("sae", ["teacher.sae=OUT/new-sae", "sae.k=65"], "sae.k (65) must be at most sae.n_latents (64)"),
        ("sae", ["teacher.sae=OUT/text"], "was not written by `cocomix sae`"),
        ("data", ["data.folder=OUT/new", "data.text=[OUT/nothing]"], "there is no file or folder"),
        ("data", ["data.folder=OUT/new", "data.text=[]"], "data.text names no text"),
        ("data", ["data.val_fraction=0.3"], "was made from something else"),
        (
            "plan",
            ["--gpus=8", "--cluster=v100"],
            "--cluster v100: there is no such file; known names: a100, h100, h200",
        ),
        ("plan", ["--gpus=3"], "train.global_batch (8) must be a multiple of train.micro_batch (4) x 3 GPUs"),
        ("plan", ["--gpus=many"], "--gpus many: expected a number"),
        ("plan", ["--gpus=2", "teacher.model=OUT/nobody"], "so its shape is not known"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(world, capsys, command, overrides, message):
    before = world.tree()
    assert call(world, command, *overrides) == 2
    assert message in one_line(capsys, command)
    assert world.tree() == before


def test_a_missing_or_broken_config_is_one_line(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no config file at" in one_line(capsys, "train")
    (tmp_path / "broken.yaml").write_text("train: [1")
    assert main(["train", str(tmp_path / "broken.yaml")]) == 2
    assert "is not valid YAML" in " ".join(capsys.readouterr().err.split())


def test_exporting_nothing_or_over_something_is_one_line(world, capsys):
    assert main(["export", str(world.folder / "text"), str(world.folder / "new")]) == 2
    assert "holds no model" in one_line(capsys, "export")
    assert main(["export", str(world.folder / "teacher"), str(world.folder / "text")]) == 2
    assert "exists already" in one_line(capsys, "export")
    assert not (world.folder / "new").exists()


def test_a_text_without_text_is_refused(world, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2" * 100)
    assert call(world, "data", f"data.text=[{tmp_path}]", f"data.folder={tmp_path}/out") == 2
    assert "there is no text in it" in one_line(capsys, "data")
    assert not (tmp_path / "out").exists()


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
        (folder / "meta.json").write_text(json.dumps(meta))
    else:
        ids[:] = meta["vocab_size"]
    ids.tofile(file)
    return "fewer than one window" if kind == "short" else "but the vocabulary has 300 ids"


@pytest.mark.parametrize("kind", ["truncated", "empty", "short", "foreign id"])
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


class Dangerous:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_an_sae_file_that_needs_unpickling_is_refused(world, tmp_path, capsys):
    dangerous = Dangerous()
    dangerous.folder = str(tmp_path / "executed")
    torch.save({"encoder.weight": dangerous}, tmp_path / "sae.pt")
    assert call(world, "train", f"teacher.sae={tmp_path}/sae.pt", f"train.run={tmp_path}/run") == 2
    assert f"{tmp_path}/sae.pt" in one_line(capsys, "train")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


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
    assert files <= {"train.bin", "val.bin"}  # whole, and worth nothing without their meta.json


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
        ("data", ["data.folder=NEW/data"], "cocomix.data.preparation.Splitter.__call__", 20),
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
    again = "starts again" if command == "data" else "goes on from what is complete"
    assert f"interrupted; the same command {again}" in capsys.readouterr().err
    assert signal.signal(signal.SIGTERM, handler) == signal.SIG_IGN
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "data/meta.json").exists() and not (tmp_path / "sae").exists()
    assert call(world, command, *overrides) == 0


def test_the_command_line_works_outside_the_main_thread(world, capsys):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call, world, "data").result() == 0
    assert "is up to date" in capsys.readouterr().out
