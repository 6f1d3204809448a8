"""Runs that begin with a checkpoint of another one."""

import math
import re
import zlib

import numpy as np
import pytest
import torch
from run_helpers import SEQ_LEN, STEPS, assert_close_weights, assert_equal_runs, stage, stop_at, uneven

from cocomix.data.token_files import TokenFiles
from cocomix.data.windows import WindowOrder, step_windows
from cocomix.model.config import CoCoMixConfig
from cocomix.model.model import CoCoMixForCausalLM
from cocomix.report.runs import load_run
from cocomix.teacher.label_cache import LabelCache
from cocomix.training.trainer import EXIT_RESUME

STABLE = ["train.schedule=wsd", "train.decay_share=0.25", "train.keep_checkpoints=9"]
LONG = f"train.tokens={2 * STEPS * 8 * SEQ_LEN}"  # decays from step 18 on, the others from step 9
NTP = "model.mixing=none"


def long_run(world, *overrides) -> str:
    """A run of twice the tokens, made once for each of the settings; its name."""
    name = f"stable-{zlib.crc32(' '.join(overrides).encode())}"
    if not (world.folder / name / "model").exists():
        assert world.train(name, *uneven(world), *STABLE, LONG, *overrides) == 0
    return name


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_shorter_budget_begins_with_a_longer_run_and_ends_as_if_it_had_trained_alone(world, zero_stage, capsys):
    source = long_run(world, *stage(zero_stage))
    run, alone = f"branch-{zero_stage}", f"alone-{zero_stage}"
    assert world.train(run, *uneven(world), *STABLE, *stage(zero_stage), branch_from=source) == 0
    assert f"begins after step 8 of {world.folder / source}" in capsys.readouterr().out
    assert world.train(alone, *uneven(world), *STABLE, *stage(zero_stage)) == 0
    assert_equal_runs(world, run, alone)
    assert [line["step"] for line in world.records(run, "train")] == list(range(1, STEPS + 1))
    record = load_run(world.folder / run).record
    assert (record.branched_from.run, record.branched_from.step) == (str(world.folder / source), 8)
    assert load_run(world.folder / run).summary["step"] == STEPS
    tokens, other = STEPS * record.tokens_per_step, load_run(world.folder / alone).record
    assert record.flops(tokens) == tokens * record.flops_per_token == other.flops(tokens)


@pytest.mark.slow
def test_two_ranks_branch_as_one_does(world):
    settings = [*uneven(world), *STABLE, "train.micro_batch=2"]
    runs = {
        "source-on-two": [*settings, LONG],
        "branch-on-two": [*settings, "--branch-from", str(world.folder / "source-on-two")],
        "alone-on-two": settings,
    }
    world.train_on(2, runs)
    assert_equal_runs(world, "branch-on-two", "alone-on-two")
    assert load_run(world.folder / "branch-on-two").record.branched_from.step == 8


def test_an_interrupted_branch_goes_on_where_it_stopped(world, monkeypatch):
    source = long_run(world)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert world.train("cut", *uneven(world), *STABLE, branch_from=source) == EXIT_RESUME
    assert world.train("cut", *uneven(world), *STABLE, branch_from=source, resume=True) == 0
    assert world.train("whole", *uneven(world), *STABLE, branch_from=source) == 0
    assert_equal_runs(world, "cut", "whole")
    assert load_run(world.folder / "cut").record.branched_from == load_run(world.folder / "whole").record.branched_from


def test_a_constant_rate_serves_every_budget(world):
    source = long_run(world, "train.schedule=constant")
    assert world.train("of-constant", *uneven(world), *STABLE, branch_from=source) == 0
    assert world.train("alone-wsd", *uneven(world), *STABLE) == 0
    assert_equal_runs(world, "of-constant", "alone-wsd")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*STABLE, "train.lr=2e-3"], "no checkpoint of .* was reached by the learning rates of this run"),
        ([*STABLE, "train.warmup_steps=4"], "no checkpoint of .* was reached by the learning rates of this run"),
        ([*STABLE, "train.tokens=128"], "no checkpoint of .* was reached by the learning rates of this run"),
        ([*STABLE, "train.seed=1"], "cannot be resumed: train.seed was 0 and is 1"),
        ([*STABLE, "model.concept_residual=true"], "cannot be resumed: model.concept_residual"),
    ],
)
def test_what_would_not_be_the_same_run_is_refused(world, overrides, message, capsys):
    source = long_run(world)
    capsys.readouterr()
    assert world.train("refused", *uneven(world), *overrides, branch_from=source) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(message, error), error
    assert not (world.folder / "refused").exists()


def test_where_a_run_began_is_not_forgotten_or_changed(world, capsys):
    source, other = long_run(world), long_run(world, "train.schedule=constant")

    def error(run, **options):
        assert world.train(run, *uneven(world), *STABLE, **options) == 2
        return capsys.readouterr().err

    assert "cannot begin with a checkpoint of its own" in error("self", branch_from="self")
    assert "has no complete checkpoint to begin with" in error("nothing", branch_from="nowhere")
    assert world.train("from-source", *uneven(world), *STABLE, branch_from=source) == 0
    wrong = dict(branch_from=other, resume=True)
    for path in (world.folder / "from-source/model").iterdir():
        path.unlink()  # or it would be finished
    assert f"began with a checkpoint of {world.folder / source}, not of" in error("from-source", **wrong)
    assert world.train("from-scratch", *uneven(world), *STABLE) == 0
    for path in (world.folder / "from-scratch/model").iterdir():
        path.unlink()
    assert "did not begin with a checkpoint of" in error("from-scratch", **wrong)


def test_a_branch_that_was_killed_before_its_first_save_does_not_start_over(world, capsys):
    source = long_run(world)
    run = world.folder / "killed"
    assert world.train("killed", *uneven(world), *STABLE, branch_from=source) == 0
    for folder in ("checkpoints", "model"):
        (run / folder).rename(run / f"gone-{folder}")
    assert world.train("killed", *uneven(world), *STABLE, resume=True) == 2
    assert f"began with a checkpoint of {world.folder / source}: pass --branch-from" in capsys.readouterr().err
    assert world.train("killed", *uneven(world), *STABLE, branch_from=source, resume=True) == 0


def plain_step(model, optimizer, ids, labels, rate) -> float:
    """One step of plain PyTorch; its loss."""
    loss = model(ids, labels=ids, concept_labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    return loss.item()


def grown_in_plain_pytorch(world, *overrides, begins=8):
    """Losses by step and final weights of a student of next-token prediction that gets concept layers after `begins`
    steps: new weights as a student of them begins with, Adam's moments of zero, Adam's count that of the others."""
    config = world.load(*uneven(world), *STABLE, *overrides)
    tokens, cache = TokenFiles.open(config.data.folder), LabelCache.open(config.concept_labels.cache)
    split = tokens.split("train")
    shape = {**vars(config.model), "vocab_size": tokens.vocab_size, "n_positions": SEQ_LEN}
    students = {}
    for mixing in ("none", config.model.mixing):
        torch.manual_seed(config.train.seed)
        model = CoCoMixForCausalLM(CoCoMixConfig(**{**shape, "mixing": mixing}))
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
        students[mixing] = model, optimizer
    order, losses = WindowOrder(split.n_windows(SEQ_LEN), config.train.seed), []
    for step in range(STEPS):
        if step == begins:
            (before, states), (model, optimizer) = students["none"], students[config.model.mixing]
            model.load_state_dict(before.state_dict(), strict=False)
            known = {name: states.state[parameter] for name, parameter in before.named_parameters()}
            for name, parameter in model.named_parameters():
                moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = known.get(name, {"step": torch.tensor(float(begins)), **moments})
        windows = step_windows(order, step, config.train.global_batch)
        ids = torch.from_numpy(np.stack([split.window(i, SEQ_LEN) for i in windows]))
        labels = torch.from_numpy(np.stack([cache.window(i) for i in windows]))
        model, optimizer = students["none" if step < begins else config.model.mixing]
        left = 1 - math.sqrt(max(0, step - 9) / 3)
        rate = config.train.lr * ((step + 1) / 3 if step < 3 else 0.1 + 0.9 * left)
        losses.append(plain_step(model, optimizer, ids, labels, rate))
    return losses, model.state_dict()


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("method", [["model.concept_residual=true"], ["model.mixing=add"]], ids=["residual", "add"])
def test_a_student_of_next_token_prediction_grows_concept_layers(world, method, zero_stage, capsys):
    source, run = long_run(world, NTP, *stage(zero_stage)), f"grown-{method[0]}-{zero_stage}"
    assert world.train(run, *uneven(world), *STABLE, *method, *stage(zero_stage), branch_from=source) == 0
    assert f"begins after step 8 of {world.folder / source}, with new concept layers" in capsys.readouterr().out
    record, ntp = (load_run(world.folder / name).record for name in (run, source))
    shared, own = 8 * record.tokens_per_step, 4 * record.tokens_per_step
    assert record.flops(shared + own) == shared * ntp.flops_per_token + own * record.flops_per_token
    losses, weights = grown_in_plain_pytorch(world, *method)
    assert world.losses(run) == pytest.approx(losses, rel=2e-5)
    final = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    assert_close_weights(world.weights(run), final, atol=2e-5)


def test_a_grown_run_that_was_interrupted_goes_on_where_it_stopped(world, monkeypatch):
    source = long_run(world, NTP)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert world.train("cut-grown", *uneven(world), *STABLE, branch_from=source) == EXIT_RESUME
    assert world.train("cut-grown", *uneven(world), *STABLE, resume=True, branch_from=source) == 0
    assert world.train("whole-grown", *uneven(world), *STABLE, branch_from=source) == 0
    assert world.losses("cut-grown") == world.losses("whole-grown")
    assert_close_weights(world.weights("cut-grown"), world.weights("whole-grown"), atol=0)


@pytest.mark.slow
def test_two_ranks_grow_as_one_does(world):
    settings = [*uneven(world), *STABLE, "train.micro_batch=2"]
    runs = {"ntp-on-two": [*settings, LONG, NTP]}
    for number in (1, 2, 3):
        source = ["--branch-from", str(world.folder / "ntp-on-two")]
        runs[f"grown-on-two-{number}"] = [*settings, *stage(number), *source]
    world.train_on(2, runs)
    losses, _ = grown_in_plain_pytorch(world)
    for number in (1, 2, 3):
        assert world.losses(f"grown-on-two-{number}") == pytest.approx(losses, rel=2e-5)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ([NTP], ["model.n_embd=64"], "cannot be resumed: model.n_embd was 32 and is 64"),
        ([NTP], ["train.seed=1"], "cannot be resumed: train.seed was 0 and is 1"),
        ([], [NTP], "cannot be resumed: model.mixing was interleave and is none"),
        ([], ["model.mixing=add"], "cannot be resumed: model.mixing was interleave and is add"),
    ],
)
def test_what_does_not_grow_is_refused(world, source, overrides, message, capsys):
    name = long_run(world, *source)
    capsys.readouterr()
    assert world.train("no-growth", *uneven(world), *STABLE, *overrides, branch_from=name) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error, error


def test_a_checkpoint_at_a_runs_own_end_is_no_beginning(world, capsys):
    source = long_run(world, "train.schedule=constant", "train.keep_checkpoints=1")
    capsys.readouterr()
    constant = [*uneven(world), LONG, "train.schedule=constant"]
    assert world.train("of-equal-length", *constant, branch_from=source) == 2
    assert "no checkpoint of" in capsys.readouterr().err
