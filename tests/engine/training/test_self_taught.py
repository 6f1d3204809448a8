"""Students whose teacher is what they were themselves after a part of their tokens."""

import math
import subprocess

import pytest
import torch
from run_helpers import SEQ_LEN, STEPS, TORCHRUN, assert_close_weights, environment, stop_at

from cocomix.cli import main
from cocomix.core.config import load_config
from cocomix.core.shapes import TeacherShape
from cocomix.costs.cluster import load_cluster
from cocomix.costs.planner import make_job
from cocomix.costs.profile_inputs import build_teachers
from cocomix.report.report import comparison_table
from cocomix.report.runs import load_run
from cocomix.teacher import sae_training
from cocomix.teacher.supervision import teacher_shape
from cocomix.training.trainer import EXIT_RESUME

TOKENS_PER_STEP, FIRST = 8 * SEQ_LEN, 4  # steps of the first part
NO_TEACHER = ["teacher.model=null", "teacher.sae=null"]
STABLE = ["train.schedule=wsd", "train.decay_share=0.25"]
SELF_TAUGHT = [*NO_TEACHER, *STABLE, f"teacher.self_taught_after={FIRST * TOKENS_PER_STEP}"]


def whole(world) -> str:
    """A self-taught run, made once; its name."""
    if not (world.folder / "self-taught/model").exists():
        assert world.train("self-taught", *SELF_TAUGHT, "train.keep_checkpoints=9", "train.save_every=1") == 0
    return "self-taught"


def assert_same(world, run, other):
    for key in ("loss", "ntp_loss", "lr", "grad_norm"):
        assert world.losses(run, key) == world.losses(other, key)
    assert_close_weights(world.weights(run), world.weights(other), atol=0)


def test_a_self_taught_run_is_what_its_parts_are_one_by_one(world):
    run, out = whole(world), world.folder
    first = [f"train.tokens={FIRST * TOKENS_PER_STEP}", "train.schedule=constant", "model.mixing=none"]
    assert world.train("by-hand-first", *first) == 0
    teacher = [f"teacher.model={out}/by-hand-first/model", f"teacher.sae={out}/by-hand-sae"]
    assert main(["sae", str(world.config), *teacher]) == 0
    assert world.train("by-hand", *STABLE, *teacher, branch_from="by-hand-first") == 0
    assert_same(world, run, "by-hand")
    assert world.losses(run)[:FIRST] == world.losses("by-hand-first")
    concept_losses = world.losses(run, "concept_loss")
    assert concept_losses[:FIRST] == [None] * FIRST and None not in concept_losses[FIRST:]
    assert [line["step"] for line in world.records(run, "eval")] == [FIRST, 6, STEPS]


def test_its_cost_holds_the_first_part_the_sae_and_the_labels(world):
    run, by_hand = load_run(world.folder / whole(world)), world.load()
    first = load_run(world.folder / "self-taught/first").record
    shared, own = FIRST * TOKENS_PER_STEP, (STEPS - FIRST) * TOKENS_PER_STEP
    d, latents, k, blocks = 32, 64, 4, by_hand.teacher.layer + 1
    of_sae = 4096 * 2 * (blocks * (12 * d * d + SEQ_LEN * d) + latents * d + 4 * k * d)
    record = run.record
    assert record.flops(shared + own) == shared * first.flops_per_token + of_sae + own * record.flops_per_token
    assert record.flops(shared) == shared * first.flops_per_token
    assert 0 < record.supervision_flops_per_token < record.flops_per_token
    assert run.title == "CoCoMix (self-taught labels)"
    assert "What CoCoMix (self-taught labels) learned from the teacher took it" in comparison_table([run])


@pytest.mark.parametrize("step", [2, FIRST + 1, 9])
def test_an_interrupted_run_goes_on_where_it_stopped(world, monkeypatch, step):
    name = f"self-taught-cut-{step}"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert world.train(name, *SELF_TAUGHT) == EXIT_RESUME
    assert world.train(name, *SELF_TAUGHT, resume=True) == 0
    assert_same(world, name, whole(world))


def test_one_that_was_interrupted_in_its_sae_goes_on_there(world, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sae_training, "train_sae", interrupted)
        assert world.train("self-taught-sae", *SELF_TAUGHT) == 130
    assert not (world.folder / "self-taught-sae/run.json").exists()
    capsys.readouterr()
    assert world.train("self-taught-sae", *SELF_TAUGHT) == 2
    assert "self-taught-sae/first already holds a run: pass --resume" in capsys.readouterr().err
    assert world.train("self-taught-sae", *SELF_TAUGHT, resume=True) == 0
    assert_same(world, "self-taught-sae", whole(world))
    assert world.train("self-taught-sae", *SELF_TAUGHT, resume=True) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_shorter_budget_has_the_longer_ones_teacher(world, monkeypatch):
    source, budget = whole(world), f"train.tokens={10 * TOKENS_PER_STEP}"
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert world.train("budget", *SELF_TAUGHT, budget, branch_from=source) == EXIT_RESUME
    assert not (world.folder / "budget/first").exists()
    assert world.train("budget", *SELF_TAUGHT, budget, resume=True) == 0
    record, other = (load_run(world.folder / name).record for name in ("budget", source))
    assert record.config["teacher"] == other.config["teacher"]
    assert record.flops(10 * TOKENS_PER_STEP) == pytest.approx(other.flops(10 * TOKENS_PER_STEP))
    assert world.train("alone", *SELF_TAUGHT, budget) == 0
    assert_same(world, "budget", "alone")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.model=x"], "teacher.self_taught_after (512) and teacher.model (x) are both set"),
        (["teacher.sae=x"], "and teacher.sae (x) are both set: set teacher.sae=null"),
        (["concept_labels.cache=x"], "and concept_labels.cache (x) are both set"),
        (["distillation.weight=0.5"], "and distillation.weight (0.5) are both set"),
        (["model.mixing=none"], "needs a student that predicts concepts, which model.mixing=none does not"),
        (["model.mixing=pause"], "needs a student that predicts concepts, which model.mixing=pause does not"),
        (["train.tokens=512"], "must be below train.tokens (512)"),
        (["train.schedule=cosine"], "needs train.schedule=wsd or constant"),
        (["train.schedule=linear"], "needs train.schedule=wsd or constant"),
        (["teacher.layer=3"], "teacher.layer (3) must be below model.n_layer (3)"),
        (["sae.n_latents=128"], "sae.n_latents (128) must be model.concept_dim (64)"),
        (["train.decay_share=0.8"], "lies where the learning rate falls already: set it to 384 at most"),
    ],
)
def test_settings_that_contradict_it_are_refused(world, overrides, message, capsys):
    before = world.tree()
    assert world.train("refused", *SELF_TAUGHT, *overrides) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error, error
    assert world.tree() == before


def test_its_plan_and_profile_know_a_teacher_of_the_students_shape(world, capsys):
    settings = [str(world.config), *SELF_TAUGHT]
    config = load_config(world.config, SELF_TAUGHT)
    assert (config.teacher.model, config.teacher.sae) == (f"{world.folder}/run/first/model", f"{world.folder}/run/sae")
    own = TeacherShape(n_embd=32, n_layer=3, layer=1, vocab_size=300, n_latents=64)
    assert make_job(config, load_cluster("h100"), 300).teacher == own
    made = build_teachers(config, torch.device("cpu"), 300, at_random=True)
    assert teacher_shape(made) == own
    assert main(["plan", *settings, "--gpus", "1"]) == 0
    assert main(["profile", *settings, "--random-teacher", "--rounds", "1", "--labels", "online"]) == 0
    assert "online labels" in capsys.readouterr().out


@pytest.mark.slow
def test_several_ranks_leave_the_sae_to_one_process(world):
    settings = [*SELF_TAUGHT, "train.micro_batch=4"]
    command = world.command("on-two", *settings, "--resume", launcher=TORCHRUN)
    run = dict(env=environment(threads=1), capture_output=True, text=True, timeout=300)
    stopped = subprocess.run(command, **run)
    assert stopped.returncode != 0
    assert "now run `cocomix sae` with this config on one process, then this again" in stopped.stderr
    assert main(["sae", str(world.config), f"train.run={world.folder}/on-two", *settings]) == 0
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stdout + done.stderr
    losses, expected = world.losses("on-two"), world.losses(whole(world))
    assert losses[:FIRST] == pytest.approx(expected[:FIRST], rel=2e-5)
    assert losses == pytest.approx(expected, rel=1e-3)  # labels of near ties may differ
    assert all(map(math.isfinite, losses))
