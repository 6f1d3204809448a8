import json
import math
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from run_helpers import (
    LATENTS,
    SEQ_LEN,
    STEPS,
    assert_close_weights,
    assert_equal_runs,
    reference_run,
    stage,
    stop_at,
    uneven,
    write_text,
)

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.core.methods import CONCEPT_LABELS
from cocomix.data.preparation import prepare
from cocomix.data.token_files import TokenFiles
from cocomix.report.runs import load_run
from cocomix.teacher.label_cache import LabelCache
from cocomix.teacher.supervision import Supervision

# ---------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_a_run_follows_plain_pytorch(world, zero_stage, micro_batch):
    losses, rates, norms, state = reference_run(world, *uneven(world))
    assert min(norms) > 1  # clipping is at work
    run = f"plain-{zero_stage}-{micro_batch}"
    assert world.train(run, *uneven(world), *stage(zero_stage), f"train.micro_batch={micro_batch}") == 0
    np.testing.assert_allclose(world.losses(run), losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(world.losses(run, "lr"), rates, rtol=1e-12)
    np.testing.assert_allclose(world.losses(run, "grad_norm"), norms, rtol=1e-4)
    weights = world.weights(run)
    assert_close_weights(weights, {name: state[name] for name in weights}, atol=1e-5)


def test_next_token_prediction_alone_follows_plain_pytorch(world):
    overrides = ["model.mixing=none", "teacher.model=null", "teacher.sae=null"]
    losses, _, _, state = reference_run(world, *overrides)
    assert world.train("plain-none", *overrides) == 0
    np.testing.assert_allclose(world.losses("plain-none"), losses, rtol=0, atol=1e-5)
    assert set(world.losses("plain-none", "concept_loss")) == {None}
    weights = world.weights("plain-none")
    assert_close_weights(weights, {name: state[name] for name in weights}, atol=1e-5)


def test_cached_and_online_labels_train_alike(world):
    assert world.train("online") == 0
    assert world.train("cached", f"concept_labels.cache={world.folder}/labels") == 0
    assert_equal_runs(world, "online", "cached")
    assert json.loads((world.folder / "online/run.json").read_text())["concept_labels"] == "online"
    assert json.loads((world.folder / "cached/run.json").read_text())["concept_labels"] == "cached"


def test_bf16_stays_near_fp32_and_exports_its_fp32_masters(world):
    assert world.train("fp32", *uneven(world)) == 0
    assert world.train("bf16", *uneven(world), "train.precision=bf16") == 0
    np.testing.assert_allclose(world.losses("bf16"), world.losses("fp32"), rtol=0, atol=5e-3)
    weights = world.weights("bf16")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())
    # Adam moves an entry by up to lr a step whatever its gradient's size, so near-zero gradients may part
    assert_close_weights(weights, world.weights("fp32"), atol=1e-3 * STEPS)


def test_a_run_on_another_processor_keeps_the_precision_that_it_began_with(world, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    overrides = [*uneven(world), "train.precision=auto", "teacher.dtype=auto"]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert world.train("auto", *overrides) == 75
    assert "train.precision=auto: bf16, since this processor multiplies it in hardware" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert world.train("auto", *overrides, resume=True) == 0
    assert "train.precision=auto: bf16, since what is continued began with it" in capsys.readouterr().out
    assert json.loads((world.folder / "auto/run.json").read_text())["config"]["train"]["precision"] == "bf16"
    assert world.train("named", *uneven(world), "train.precision=bf16") == 0
    assert_equal_runs(world, "auto", "named")


def test_online_labels_follow_the_precision_of_a_cache(world, monkeypatch, capsys):
    """So that a cache which another machine filled can be trained from, and filled further."""
    cache = f"concept_labels.cache={world.folder}/labels"  # in fp32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert main(["labels", str(world.config), cache, "teacher.dtype=auto"]) == 0
    assert "teacher.dtype=auto: fp32, since what is continued began with it" in capsys.readouterr().out
    assert world.train("auto-labels", cache, "teacher.dtype=auto") == 0
    assert "teacher.dtype" not in capsys.readouterr().out  # no teacher computes
    fresh = f"concept_labels.cache={world.folder}/fresh-labels"
    assert main(["labels", str(world.config), fresh, "teacher.dtype=auto"]) == 0
    assert "teacher.dtype=auto: bf16, since this processor" in capsys.readouterr().out
    assert LabelCache.open(world.folder / "fresh-labels").fingerprints["dtype"] == "bfloat16"


def test_a_student_without_labels_does_not_look_at_their_cache(world, tmp_path):
    (tmp_path / "meta.json").write_text("damaged")
    cache = f"concept_labels.cache={tmp_path}"
    for number, precision in enumerate(("fp32", "auto")):
        overrides = [cache, "model.mixing=none", f"train.precision={precision}", f"teacher.dtype={precision}"]
        assert world.train(f"without-labels-{number}", *overrides, f"train.tokens={8 * SEQ_LEN}") == 0


def test_labels_for_others_follow_the_precision_of_their_cache(world, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    cache = f"concept_labels.cache={world.folder}/labels"  # in fp32
    assert main(["labels", str(world.config), cache, "teacher.dtype=auto", "model.mixing=none"]) == 0
    assert "teacher.dtype=auto: fp32, since what is continued began with it" in capsys.readouterr().out


def test_metrics_hold_what_the_report_reads(world):
    assert world.train("schema", *uneven(world)) == 0
    run = load_run(world.folder / "schema")
    assert [record["step"] for record in run.train] == list(range(1, STEPS + 1))
    assert [record["step"] for record in run.evaluations] == [6, 12]
    assert run.summary["step"] == STEPS and run.summary["loss"] == run.evaluations[-1]["loss"]
    assert run.train[-1]["tokens"] == STEPS * 8 * SEQ_LEN
    for record in run.train:
        assert record["loss"] == pytest.approx(record["ntp_loss"] + 0.1 * record["concept_loss"], abs=1e-6)
        assert record["tokens_per_s"] == pytest.approx(8 * SEQ_LEN / record["step_time_s"])
        assert record["peak_memory_gib"] > 0 and record["grad_norm"] > 0
    assert run.evaluations[-1]["perplexity"] == pytest.approx(math.exp(run.evaluations[-1]["loss"]))
    strict = (world.folder / "schema/metrics.jsonl").read_text()
    assert "NaN" not in strict and "Infinity" not in strict


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    "settings", [stage(0), stage(2), stage(3), ["train.precision=bf16"]], ids=lambda settings: settings[0]
)
def test_sigterm_saves_and_resume_goes_on_bit_for_bit(world, monkeypatch, capsys, settings):
    name = settings[0].replace("=", "-")
    whole, parts = f"whole-{name}", f"parts-{name}"
    assert world.train(whole, *uneven(world, *settings)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step=7)
        assert world.train(parts, *uneven(world, *settings)) == 75
    assert f"interrupted: saved step 7 of {STEPS}; go on with --resume" in capsys.readouterr().out
    assert not (world.folder / parts / "model").exists()
    assert world.train(parts, *uneven(world, *settings), resume=True) == 0
    assert_equal_runs(world, whole, parts)
    assert len(world.records(parts, "summary")) == 1


def test_sigterm_between_log_steps_is_obeyed_at_once_and_logged(world, monkeypatch):
    stop_at(monkeypatch, step=5)
    assert world.train("unlogged", *uneven(world), "train.log_every=100") == 75
    assert [record["step"] for record in world.records("unlogged")] == [4, 5]  # 4: a save is preceded by a check


def test_an_interrupt_at_the_last_step_finishes_the_run(world, monkeypatch):
    stop_at(monkeypatch, step=STEPS)
    assert world.train("last", *uneven(world)) == 0
    assert (world.folder / "last/model/config.json").exists()


def test_a_used_folder_is_refused_and_a_finished_run_says_so(world, capsys):
    assert world.train("used", *uneven(world)) == 0
    before = (world.folder / "used/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert world.train("used", *uneven(world)) == 2
    assert "already holds a run: pass --resume" in capsys.readouterr().err
    assert world.train("used", *uneven(world), resume=True) == 0
    assert f"is finished: {STEPS} steps" in capsys.readouterr().out
    assert (world.folder / "used/metrics.jsonl").read_bytes() == before


def test_a_run_that_was_killed_before_its_model_was_written_is_finished_by_resume(world):
    assert world.train("unfinished", *uneven(world)) == 0
    expected = world.weights("unfinished"), world.records("unfinished", "summary")[0]["loss"]
    for file in (world.folder / "unfinished/model").iterdir():
        file.unlink()
    assert world.train("unfinished", *uneven(world), resume=True) == 0
    assert_close_weights(world.weights("unfinished"), expected[0], atol=0)
    assert world.records("unfinished", "summary")[0]["loss"] == expected[1]
    assert len(world.records("unfinished", "summary")) == 1


def test_a_resumed_run_that_is_already_past_its_shortened_end_is_finished_where_it_is(world, capsys):
    assert world.train("shortened", *uneven(world)) == 0
    shutil.rmtree(world.folder / "shortened/model")
    assert world.train("shortened", *uneven(world), f"train.tokens={8 * SEQ_LEN * 6}", resume=True) == 0
    assert f"after {STEPS} steps" in capsys.readouterr().out.splitlines()[-1]
    assert (world.folder / "shortened/model/config.json").exists()


def test_training_leaves_the_process_as_it_was(world):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    variables = dict(os.environ)
    assert world.train("clean", *uneven(world)) == 0
    assert world.train("clean-not", *uneven(world), "train.global_batch=6", "train.micro_batch=3") == 0
    assert not torch.distributed.is_initialized()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    announced = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ.get(name) for name in announced] == [variables.get(name) for name in announced]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("mixing", ["interleave", "none"])
def test_a_run_that_diverges_says_where_and_saves_nothing_more(world, capsys, stage, mixing):
    run = f"diverged-{stage}-{mixing}"
    code = world.train(
        run,
        *uneven(world),
        "train.lr=1e30",
        "train.log_every=50",
        f"train.zero_stage={stage}",
        f"model.mixing={mixing}",
    )
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "training has diverged at step 11: in 10 steps in a row" in error and "lower train.lr" in error.lower()
    windows = world.records(run, "event")[-1]["windows"]
    assert len(windows) == 8 and f"windows {windows[0]}, {windows[1]}, " in error
    assert not (world.folder / run / "checkpoints").exists()


def source(world, *overrides):
    config = world.load(*overrides)
    return Supervision.from_config(config, TokenFiles.open(config.data.folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def strangers(world):
    """Other data, another teacher, another SAE, and SAEs that do not fit."""
    write_text(world.folder / "text2", seed=1)
    prepare(replace(world.load().data, text=[str(world.folder / "text2")], folder=str(world.folder / "data2")))
    world.add_teacher("teacher2", "sae2", seed=2)
    world.add_teacher("teacher-wide", "sae-wide", width=48)
    world.add_teacher("teacher-small", "sae-96", latents=96, vocab_size=50)
    return world.folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["concept_labels.cache=OUT/nowhere"], "label cache .*nowhere is missing.*`cocomix labels` makes it"),
        (["concept_labels.cache=OUT/labels", "data.folder=OUT/data2"], "was made from other token files"),
        (["concept_labels.cache=OUT/labels", "teacher.model=OUT/teacher2"], "was made from another teacher"),
        (["concept_labels.cache=OUT/labels", "teacher.sae=OUT/sae2"], "was made from another SAE"),
        (["concept_labels.cache=OUT/labels", "data.seq_len=8"], "was made from another window length"),
        (["concept_labels.cache=OUT/labels", "teacher.layer=0"], "was made from another block"),
        (["concept_labels.cache=OUT/labels", "teacher.label_topk=2"], "was made from another number of labels"),
        (["concept_labels.cache=OUT/labels", "teacher.dtype=bf16"], "was made from .*another precision"),
        (
            ["concept_labels.cache=OUT/labels", "model.concept_dim=128"],
            "model.concept_dim is 128 but the SAE has 64 latents",
        ),
        (["model.concept_dim=128"], "model.concept_dim is 128 but the SAE has 64 latents"),
        (["teacher.sae=OUT/sae-96"], "model.concept_dim is 64 but the SAE has 96 latents"),
        (["teacher.sae=OUT/sae-wide"], "reads vectors of 48 but the teacher's residual stream has 32"),
        (["teacher.model=OUT/teacher-small"], "it was made for another tokenizer"),
        (["teacher.model=null"], "concept labels need teacher.model"),
        (["teacher.model=OUT/nobody"], "cannot load a causal language model"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_training(world, strangers, overrides, message):
    overrides = [text.replace("OUT", str(strangers)) for text in overrides]
    with pytest.raises(CocomixError, match=message):
        source(world, *overrides)


def test_an_incomplete_cache_is_refused(world):
    cache = world.add_uneven_labels("incomplete")
    os.unlink(sorted(cache.glob("labels-*.bin"))[-1])
    with pytest.raises(CocomixError, match="is incomplete: 1 of"):
        source(world, f"concept_labels.cache={cache}", *uneven(world)[1:])


def test_cached_concepts_beyond_the_students_are_refused(world, capsys):
    world.add_uneven_labels("too-many", latents=2 * LATENTS)
    assert world.train("too-many-run", f"concept_labels.cache={world.folder}/too-many", *uneven(world)[1:]) == 2
    assert "model.concept_dim is 64" in capsys.readouterr().err


def test_labels_are_not_read_where_there_is_no_mixing(world):
    assert source(world, "model.mixing=none", "teacher.model=/nowhere").kind(CONCEPT_LABELS) is None
