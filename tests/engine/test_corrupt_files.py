"""The short form of `corrupt_files.py`, and whether it would notice what it is there for."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from corrupt_files import Case, Run, classify, last_line, report
from corruptions import BYTE_WAYS, DEPTH, FORMATS, TEXT_WAYS, damage
from run_helpers import environment

PROGRAM = Path(__file__).parents[1] / "helpers" / "corrupt_files.py"


@pytest.mark.slow
def test_damage_is_refused_said_or_harmless():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--cases", "150", "--seed", "0"],
        env=environment(threads=1),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 cases (seed 0)" in done.stdout and ": 0 bad" in done.stdout


# --- the damage

CONTENTS = {
    "a.json": json.dumps({"name": "run", "list": [1, {"x": None}], "empty": {}}, indent=2),
    "a.jsonl": "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(5)),
    "a.yaml": "out: .\nmodel: {n_embd: 32, names: [a, b]}\n",
    "a.bin": "0123456789" * 20,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_damage_changes_the_file_alone_and_follows_from_the_draw(tmp_path, name):
    (tmp_path / "original").write_text(CONTENTS[name])
    file, told = tmp_path / name, set()
    for seed in range(60):
        results = []
        for _ in range(2):
            file.unlink(missing_ok=True)
            os.link(tmp_path / "original", file)
            os.utime(file, (7, 7))
            results.append((damage(file, random.Random(seed)), file.read_bytes()))
            assert file.stat().st_mtime == 7
        assert results[0] == results[1] and results[0][1] != CONTENTS[name].encode()
        told.add(results[0][0])
    assert (tmp_path / "original").read_text() == CONTENTS[name] and len(told) > 30


@pytest.mark.parametrize("way", [way for way, _ in TEXT_WAYS])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml"])
def test_text_stays_text_of_its_format_but_for_one_place(name, way):
    suffix, content = Path(name).suffix, CONTENTS[name].encode()
    for seed in range(20):
        changed, words = way(content, suffix, random.Random(seed))
        assert b"DAMAGED" not in changed
        if way.__name__ == "delete_value":
            lines = changed.decode().splitlines() if suffix == ".jsonl" else [changed.decode()]
            assert all(FORMATS[suffix](line) is not None for line in lines)
        if f"{DEPTH:,} nested lists" in words:
            assert DEPTH * b"[" in changed


@pytest.mark.parametrize("way", BYTE_WAYS)
def test_half_of_the_damage_to_weights_is_in_their_header(way):
    header = b'{"a":{"dtype":"F32"}}'
    content = len(header).to_bytes(8, "little") + header + bytes(range(256)) * 40
    in_header = 0
    for seed in range(100):
        changed, _ = way(content, ".safetensors", random.Random(seed))
        in_header += changed[: 8 + len(header)] != content[: 8 + len(header)]
    assert way.__name__ in ("truncate", "append", "repeat") or in_header > 30


# --- the outcomes

CLEAN = Run(0, "run: loss 5.25\n", "labels: 10%|# | 1/10 [00:00<00:01, 5tok/s]\nnote: slow\n", {"weights": "a"})
SHARD, STATE = Path("labels/labels-000003.bin"), Path("run/checkpoints/step-00000004/state/rank-00000.safetensors")


@pytest.mark.parametrize(
    "run, outcome",
    [
        (Run(2, "", "cocomix train: error: a.bin is damaged\n", None), "error"),
        (Run(2, "", "\r 10%|# | 1/10\nnote: slow\ncocomix eval: error: a.bin is damaged\n", None), "error"),
        (Run(2, "", "cocomix eval: error: a.bin is damaged\nat line 5\n", None), "lines"),
        (Run(2, "", "", None), "lines"),
        (Run(0, "run: loss 5.25\n", "", {"weights": "a"}), "right"),
        (Run(0, "run: loss 7.75\n", "", {"weights": "b"}), "silent"),
        (Run(0, "", "something is odd\n", {"weights": "b"}), "silent"),
        (Run(0, "", "labels-000003.bin: left out\n", {"weights": "b"}), "said"),
        (Run(0, "", "labels: shard 3 of labels is damaged: it is made anew\n", {"weights": "a"}), "said"),
        (Run(0, "", "Traceback (most recent call last):\n", {"weights": "a"}), "traceback"),
        (Run(1, "", "Traceback (most recent call last):\nValueError\n", None), "traceback"),
        (Run(75, "", "", None), "other code"),
        (Run(-11, "", "", None), "crash"),
        (Run(None, "", "", None), "hang"),
    ],
)
def test_outcomes_are_told_apart(run, outcome):
    assert classify(run, CLEAN, SHARD) == outcome


def test_a_checkpoint_is_named_by_its_folder_and_what_was_said_before_names_nothing():
    line = "run/checkpoints/step-00000004 is damaged: passed over\n"
    assert classify(Run(0, line, "", {"weights": "b"}), CLEAN, STATE) == "said"
    clean = Run(0, line, "", {"weights": "a"})
    assert classify(Run(0, line, "", {"weights": "b"}), clean, STATE) == "silent"


def test_the_report_counts_by_kind_and_lists_what_is_bad():
    cases = [
        Case(3, "run.json -> eval", "run/run.json", "bit 1 flipped", "error", "cocomix eval: error: no", 0.1),
        Case(4, "run.json -> eval", "run/run.json", "cut", "crash", "", 0.1),
    ]
    table = report(cases)
    assert "| run.json -> eval | 2 | 1 |" in table and "| all | 2 | 1 |" in table
    assert table.splitlines()[-1] == "crash: case 4, run.json -> eval: run/run.json: cut"


def test_the_last_line_of_a_traceback_says_where_in_the_program_it_came_from():
    errors = (
        'Traceback (most recent call last):\n  File "/x/engine/cocomix/data/windows.py", line 7, in split\n'
        '    x\n  File "/x/numpy/core.py", line 9, in y\nKeyError: 3\n10%|# | 1/10\n'
    )
    assert last_line(errors) == "cocomix/data/windows.py, line 7, split: KeyError: 3"
