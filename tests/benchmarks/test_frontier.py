"""`benchmarks/frontier.py`: the whole of it in miniature, and what it would run."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import environment, write_text

from cocomix.report.runs import load_run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the benchmarks are programs, not part of the package
import frontier  # noqa: E402

STEPS, SEQ_LEN = 20, 16
TEACHER = f"""
out: OUT
data: {{folder: "${{out}}/teacher-data", text: [TEXT/teacher], vocab_size: 300, val_fraction: 0.1, seq_len: {SEQ_LEN}}}
model: {{n_embd: 32, n_layer: 3, n_head: 2, mixing: none}}
train: {{run: "${{out}}/teacher", tokens: 1024, global_batch: 8, micro_batch: 8, warmup_steps: 2, eval_every: 4,
        tensorboard: false}}
"""
STUDENT = f"""
out: OUT
data: {{folder: "${{out}}/data", text: [TEXT/student], tokenizer: "${{out}}/teacher-data/tokenizer", val_fraction: 0.1,
       seq_len: {SEQ_LEN}}}
model: {{n_embd: 32, n_layer: 2, n_head: 2, mixing: none, concept_dim: 64, concept_topk: 4, insert_layer: 1}}
teacher: {{model: "${{out}}/teacher/model", sae: "${{out}}/sae", layer: 1, label_topk: 3}}
sae: {{n_latents: 64, k: 4, tokens: 2048, batch_tokens: 256, warmup_steps: 2, aux_k: 8, dead_after_tokens: 2000}}
concept_labels: {{cache: "${{out}}/labels", shard_windows: 64}}
train: {{tokens: {STEPS * 8 * SEQ_LEN}, global_batch: 8, micro_batch: 8, lr: 2e-3, schedule: wsd, decay_share: 0.2,
        warmup_steps: 2, log_every: 2, eval_every: 5, save_every: 4, keep_checkpoints: 9, tensorboard: false}}
"""
METHODS = {
    "ntp": "",
    "add": "model: {mixing: add}",
    "residual": "model: {mixing: interleave, concept_residual: true}",
    "self-taught": """model: {mixing: add}
teacher: {model: null, sae: null, self_taught_after: 768}
concept_labels: {cache: null}""",
}


@pytest.fixture
def folder(tmp_path):
    """Configs and text for minutes' worth of nothing."""
    write_text(tmp_path / "text/teacher", documents=20, seed=1)
    write_text(tmp_path / "text/student", documents=20)
    for name, content in {"teacher": TEACHER, "student": STUDENT}.items():
        content = content.replace("OUT", str(tmp_path / "out")).replace("TEXT", str(tmp_path / "text"))
        (tmp_path / f"{name}.yaml").write_text(content)
    (tmp_path / "methods").mkdir()
    for name, content in METHODS.items():
        (tmp_path / f"methods/{name}.yaml").write_text(f"base: ../student.yaml\n{content}\n")
    return tmp_path


def command(folder, *options):
    return [sys.executable, ROOT / "benchmarks/frontier.py", str(folder), "--budgets", "0.5,1", *options]


@pytest.mark.slow
def test_the_whole_frontier_in_miniature_goes_on_after_an_interrupt(folder):
    options = ["--methods", "ntp,add,residual,self-taught", "--seeds", "0,1"]
    process = subprocess.Popen(command(folder, *options), env=environment(threads=1), stderr=subprocess.PIPE, text=True)
    runs = folder / "out/runs"
    deadline = time.monotonic() + 300
    while not list(runs.glob("*/*/*/run.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command goes on where it stopped" in error

    done = subprocess.run(
        command(folder, *options), env=environment(threads=1), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(runs.glob("*/*/*/checkpoints"))
    found = json.loads((folder / "out/comparison.json").read_text())
    assert len(found["arms"]) == 4 and found["arms"][0]["title"] == "NTP, 2 seeds, 2 budgets"
    for arm in found["arms"]:
        assert [point["tokens"] for point in arm["points"]] == [STEPS * 8 * SEQ_LEN // 2, STEPS * 8 * SEQ_LEN]
        assert len(arm["runs"]) == 4 and set(arm["curves"]) == {"0", "1"}
    branch = load_run(runs / f"residual/seed-1/{STEPS * 8 * SEQ_LEN // 2}-tokens")
    assert branch.record.branched_from.step == 8 and branch.last_step == STEPS // 2
    taught = load_run(runs / f"self-taught/seed-1/{STEPS * 8 * SEQ_LEN // 2}-tokens").record
    assert taught.config["teacher"]["model"] == str(runs / "self-taught/seed-1/full/first/model")
    assert (folder / "out/report/report.html").exists()
    again = subprocess.run(command(folder, *options), env=environment(threads=1), capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("+ cocomix") == 1  # the report alone
    kept = (runs / "ntp/seed-0/full/metrics.jsonl").read_text()
    more = [*options[:1], "ntp", "--seeds", "0", "--budgets", "0.8,1"]  # one more, whose checkpoints are gone
    late = subprocess.run(command(folder, *more), env=environment(threads=1), capture_output=True, text=True)
    assert late.returncode == 2 and "has no complete checkpoint to begin with" in late.stderr
    assert (runs / "ntp/seed-0/full/metrics.jsonl").read_text() == kept


def test_what_a_cluster_would_run_is_listed(folder, capsys):
    options = ["--list", "--seeds", "3,1", "--budgets", "0.25,0.5", "--methods", "add,ntp", "train.lr=1e-3"]
    assert frontier.main([str(folder), *options]) == 0
    lines = [[shlex.split(part)[2:] for part in line.split(" && ")] for line in capsys.readouterr().out.splitlines()]
    assert [line[0][1] for line in lines] == ["data", "train", "data", "sae", "labels", *["train"] * 4]
    assert all("train.lr=1e-3" in command for line in lines for command in line)
    family = lines[5]
    out = folder / "out/runs/add/seed-1"
    assert [part[-1] for part in family] == ["--resume", str(out / "full"), str(out / "full")]
    budgets = [next(word for word in part if word.startswith("train.tokens=")) for part in family]
    assert budgets == [f"train.tokens={steps * 8 * SEQ_LEN}" for steps in (20, 10, 5)]
    assert len({word for line in lines[5:] for word in line[0] if word.startswith("train.run=")}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "ntp,nothing"], "has no nothing.yaml; it has: add, ntp, residual, self-taught"),
        (["train.tokens=0"], "train.tokens"),
    ],
)
def test_what_cannot_be_run_is_refused(folder, options, message, capsys):
    assert frontier.main([str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_budgets_that_end_before_a_student_teaches_itself_are_left_out_and_said(folder, capsys):
    options = ["--list", "--seeds", "0", "--budgets", "0.25,0.5", "--methods", "ntp,self-taught"]
    assert frontier.main([str(folder), *options]) == 0
    said = capsys.readouterr()
    assert "self-taught teaches itself too late for budgets of 0.25: left out" in said.err
    ntp, taught = said.out.splitlines()[-2:]
    assert ntp.count(" && ") == 2 and taught.count(" && ") == 1


@pytest.mark.parametrize("options", [["--budgets", "0,1"], ["--budgets", "2"], ["--seeds", "x"], ["--jobs", "0"]])
def test_options_that_mean_nothing_are_refused(folder, options, capsys):
    with pytest.raises(SystemExit):
        frontier.parse([str(folder), *options])
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "caches"), [("1m", 3), ("5m", 3)])
def test_the_projects_own_frontiers_can_be_planned(size, caches, capsys):
    folder = ROOT / "configs/frontier" / size
    assert frontier.main([str(folder), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" labels " in line for line in lines) == caches
    assert sum("&&" in line for line in lines) == 3 * len(list((folder / "methods").iterdir()))
