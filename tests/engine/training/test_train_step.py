"""Steps whose loss or gradient is not finite, and spikes of the loss."""

import gc
import json
import math
import subprocess
import weakref

import numpy as np
import pytest
from run_helpers import (
    SEQ_LEN,
    STEPS,
    assert_close_weights,
    assert_equal_runs,
    before_steps,
    environment,
    reference_run,
    stage,
    stop_at,
    uneven,
)

from cocomix.data.token_files import TokenFiles
from cocomix.data.windows import WindowOrder, step_windows
from cocomix.training.train_step import TrainStep


def infinite_loss(loss):
    return loss + math.inf  # its gradient is finite


def broken_gradient(loss):
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


def spike(loss):
    return loss * 3


def spoil(monkeypatch, steps, change, micro_batch=1):
    """Let `change` replace the loss of one micro batch of 1-based `steps`."""

    def work(train_step):
        engine, calls = train_step.engine, []

        def hook(module, args, out):
            calls.append(1)
            if len(calls) == micro_batch + 1 and module.training:
                out.loss = change(out.loss)

        if engine.global_steps + 1 in steps:
            handle = engine.module.register_forward_hook(hook)
            handles.append(handle)
        elif handles:
            handles.pop().remove()

    handles = []
    before_steps(monkeypatch, work)


@pytest.mark.parametrize("change", [infinite_loss, broken_gradient])
@pytest.mark.parametrize(
    "settings",
    [stage(0), stage(1), stage(2), stage(3), ["train.precision=bf16"], ["train.offload_optimizer=true"]],
    ids=lambda settings: settings[0],
)
def test_a_step_that_is_not_finite_is_left_out_counted_and_named(world, monkeypatch, capsys, change, settings):
    run = f"{change.__name__}-{settings[0]}"
    with monkeypatch.context() as patch:
        spoil(patch, [5], change)
        assert world.train(run, *uneven(world), *settings, "train.micro_batch=2") == 0
    losses, rates, _, weights = reference_run(world, *uneven(world), skipped=[5])
    is_bf16, records, trained = "bf16" in settings[0], world.records(run), world.weights(run)
    np.testing.assert_allclose(
        [record["loss"] for record in records],
        [x for i, x in enumerate(losses) if i != 4],
        rtol=0,
        atol=2e-3 if is_bf16 else 1e-5,
    )
    if not is_bf16:
        assert_close_weights({name: weights[name] for name in trained}, trained, atol=1e-5)
    np.testing.assert_allclose([record["lr"] for record in records], [r for i, r in enumerate(rates) if i != 4])
    assert [record["skipped_steps"] for record in records] == [0] * 4 + [1] * 7
    assert all(math.isfinite(record["grad_norm"]) for record in records)
    [event] = world.records(run, "event")
    assert (event["event"], event["step"]) == ("skipped", 5)
    assert event["windows"] == step_windows(_order(world), 4, 8).tolist()
    assert "step 5: skipped: the loss or its gradient is not finite" in capsys.readouterr().err


def _order(world):
    return WindowOrder(TokenFiles.open(world.folder / "data").split("train").n_windows(SEQ_LEN), 0)


def test_a_run_with_a_skipped_step_goes_on_bit_for_bit(world, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, [3], infinite_loss, micro_batch=0)
        assert world.train("skip-whole", *uneven(world), "train.log_every=4") == 0
        stop_at(patch, 6)
        assert world.train("skip-parts", *uneven(world), "train.log_every=4") == 75
    assert world.train("skip-parts", *uneven(world), "train.log_every=4", resume=True) == 0
    assert world.records("skip-whole")[-1]["skipped_steps"] == world.records("skip-parts")[-1]["skipped_steps"] == 1
    assert_close_weights(world.weights("skip-whole"), world.weights("skip-parts"), atol=0)


def test_no_checkpoint_is_made_of_a_step_that_was_skipped(world, monkeypatch):
    spoil(monkeypatch, [4, 5], broken_gradient, micro_batch=0)
    assert world.train("postponed", *uneven(world), "train.keep_checkpoints=9") == 0
    assert sorted(path.name[-2:] for path in (world.folder / "postponed/checkpoints").iterdir()) == ["08", "12"]


def test_too_many_skipped_steps_in_a_row_end_the_run(world, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoil(patch, [2, 4, 5, 6], infinite_loss, micro_batch=0)
        assert world.train("given-up", *uneven(world), "train.max_skipped_steps=3") == 2
    assert "diverged at step 6: in 3 steps in a row" in capsys.readouterr().err
    assert [event["step"] for event in world.records("given-up", "event")] == [2, 4, 5, 6]


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_run_of_which_every_step_is_skipped_has_diverged(world, capsys, log_every):
    settings = [*uneven(world), f"train.tokens={3 * 8 * 16}", "model.concept_loss_weight=1e30"]
    assert world.train(f"nothing-{log_every}", *settings, "train.grad_clip=1e30", f"train.log_every={log_every}") == 2
    assert "training has diverged at step 3: in 3 steps in a row" in capsys.readouterr().err
    assert not (world.folder / f"nothing-{log_every}/model").exists()


def test_a_loss_spike_is_logged_with_its_batch(world, monkeypatch, capsys):
    monkeypatch.setattr("cocomix.training.loss_watch._SETTLED_STEPS", 4)
    with monkeypatch.context() as patch:
        spoil(patch, [9], spike, micro_batch=0)
        assert world.train("spike", *uneven(world), "train.log_every=5") == 0
        assert world.train("blind", *uneven(world), "train.spike_deviations=0") == 0
    [event] = world.records("spike", "event")
    assert (event["event"], event["step"]) == ("spike", 9)
    assert event["windows"] == step_windows(_order(world), 8, 8).tolist()
    assert "step 9: loss spike" in capsys.readouterr().err
    assert world.records("blind", "event") == []


def test_the_running_averages_come_back_on_resume(world, monkeypatch):
    def mean_of(run):
        [file] = (world.folder / run / "checkpoints").glob("step-00000012/trainer.json")
        return json.loads(file.read_text())["loss_watch"]

    assert world.train("mean-whole", *uneven(world)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert world.train("mean-parts", *uneven(world)) == 75
    assert world.train("mean-parts", *uneven(world), resume=True) == 0
    assert mean_of("mean-whole") == mean_of("mean-parts") and mean_of("mean-whole")["steps"] == STEPS
    assert_equal_runs(world, "mean-whole", "mean-parts")


def test_the_last_micro_batchs_graph_is_gone_before_the_next_one_is_computed(world, monkeypatch):
    """Two graphs at a time would double the memory of the activations."""
    alive, outputs = [], []
    forward_backward = TrainStep._forward_backward

    def counted(self, batch, share):
        alive.append(sum(ref() is not None for ref in outputs))
        handle = self.engine.module.register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out.loss)))
        losses = forward_backward(self, batch, share)
        handle.remove()
        return losses

    monkeypatch.setattr(TrainStep, "_forward_backward", counted)
    gc.disable()
    try:
        assert world.train("graphs", *uneven(world), "train.tokens=256", "train.micro_batch=2") == 0
    finally:
        gc.enable()
    assert len(alive) == 8 and not any(alive)


@pytest.mark.slow
def test_memory_stays_flat(world):
    """3,000 steps with saves and evaluations, in a process of their own; the first third may fill caches."""
    command = world.command(
        "flat",
        *uneven(world),
        "train.global_batch=2",
        "train.micro_batch=2",
        "train.tokens=96000",
        "train.save_every=500",
        "train.eval_every=500",
        "train.eval_windows=2",
        "train.log_every=100",
    )
    subprocess.run(command, env=environment(threads=1), check=True, capture_output=True, timeout=300)
    peaks = {record["step"]: record["peak_memory_gib"] for record in world.records("flat")}
    assert peaks[3000] - peaks[1000] < 3 / 1024
