"""A run goes on bit for bit with the same ranks and stage, and on the same trajectory with others."""

import json

import numpy as np
import pytest
import torch
from run_helpers import SEQ_LEN, STEPS, assert_close_weights, assert_equal_runs, before_steps, stage, uneven
from safetensors.torch import load_file

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenFiles
from cocomix.data.windows import WindowDataset
from cocomix.distributed.checkpoint import latest_checkpoint
from cocomix.distributed.export import load_model
from cocomix.distributed.ranks import process_group
from cocomix.distributed.training_state import state_to_save
from cocomix.training.resume import MAY_CHANGE, require_same_run, settings
from cocomix.training.trainer import Trainer
from cocomix.training.validation import Validation, validation_loss

BF16, OFFLOADED = "train.precision=bf16", "train.offload_optimizer=true"
CUT = 4  # every run here is resumed from its checkpoint of this step


def whole_run(world, name, *more):
    """A run of all steps in this process that keeps its checkpoints; its name."""
    if not (world.folder / name).exists():
        assert world.train(name, *uneven(world), "train.keep_checkpoints=3", *more) == 0
    return name


def assert_same_trajectory(world, run, other, loss_atol=1e-5, weight_atol=1e-5):
    for key in ("loss", "concept_loss"):
        np.testing.assert_allclose(world.losses(run, key), world.losses(other, key), rtol=0, atol=loss_atol)
    assert world.losses(run, "lr") == world.losses(other, "lr")
    assert_close_weights(world.weights(run), world.weights(other), atol=weight_atol)


def bounds(more):
    """bf16 parts where sums are taken in another order: an entry by at most lr a step."""
    return {"loss_atol": 5e-4, "weight_atol": 1e-3 * (STEPS - CUT)} if BF16 in more else {}


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (stage(0), stage(3)),
        (stage(3), stage(0)),
        (stage(1), stage(3)),
        (stage(3), stage(2)),
        (stage(2), stage(1)),
        (stage(3), [*stage(1), OFFLOADED]),
        ([*stage(3), OFFLOADED], stage(0)),
        ([*stage(1), BF16], [*stage(3), BF16]),
        ([*stage(3), BF16], [*stage(2), BF16]),
        ([*stage(2), BF16], [*stage(1), BF16]),
    ],
    ids=lambda more: "-".join(text.rpartition("=")[2] for text in (more[0], *more[-1:]) if "sub_group" not in text),
)
def test_another_stage_and_micro_batch_go_on_with_the_same_trajectory(world, before, after):
    tag = f"{before[0][-1]}{BF16 in before:d}{OFFLOADED in before:d}"
    source = whole_run(world, f"from-{tag}", *before, "train.micro_batch=2")
    run = world.cut(source, f"{source}-to-{after[0][-1]}{OFFLOADED in after:d}", CUT)
    assert world.train(run, *uneven(world), *after, "train.micro_batch=4", resume=True) == 0
    assert_same_trajectory(world, run, source, **bounds(after))


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 2, 3])
def test_weights_and_moments_come_back_bit_for_bit_at_every_stage(world, before, after):
    source = whole_run(world, f"from-{before}00", *stage(before), "train.micro_batch=2")
    run = world.folder / world.cut(source, f"{source}-only-loaded-{after}", CUT)
    checkpoint = latest_checkpoint(run)
    config = world.load(*uneven(world), *stage(after), "train.micro_batch=2", f"train.run={run}")
    with process_group(1) as ranks:
        trainer = Trainer(config, ranks)
        trainer._begin()
        loss = trainer.validation.evaluate().loss
        loaded = {key: tensor.clone() for key, tensor in state_to_save(trainer.engine, ranks).items()}
        trainer.close()
    saved = load_file(checkpoint / "state/rank-00000-of-00001.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in loaded.items())
    split = TokenFiles.open(config.data.folder).split("val")
    total, count = validation_loss(load_model(checkpoint), split, SEQ_LEN, 2, torch.device("cpu"))
    assert loss == pytest.approx(float(total) / count, abs=1e-7)  # with the weights it computes with


def test_no_window_is_read_twice_or_left_out(world, monkeypatch):
    read = []
    get = WindowDataset.__getitem__
    monkeypatch.setattr(WindowDataset, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    monkeypatch.setattr(
        Validation, "_concept_statistics", lambda self: {}
    )  # which reads windows without training on them
    source = whole_run(world, "windows", "train.micro_batch=2")
    whole, part = list(read), 8 * CUT
    read.clear()
    run = world.cut(source, "windows-cut", CUT)
    assert world.train(run, *uneven(world), *stage(2), "train.micro_batch=8", resume=True) == 0
    assert whole[:part] + read == whole
    assert len(set(whole)) == len(whole) == 8 * STEPS


def test_random_states_come_back(world, monkeypatch):
    drawn = []
    before_steps(monkeypatch, lambda _: drawn.append(float(torch.rand(()))))
    source = whole_run(world, "drawn")
    expected = drawn[CUT:]
    drawn.clear()
    torch.manual_seed(99)
    assert world.train(world.cut(source, "drawn-cut", CUT), *uneven(world), resume=True) == 0
    assert drawn == expected


# ---------------------------------------------------------------------------------------------- what may change


def test_what_steers_the_run_takes_effect_from_the_resumed_step_on_and_is_named(world, capsys):
    source = whole_run(world, "steered")
    run = world.cut(source, "steered-cut", CUT)
    capsys.readouterr()
    assert world.train(run, *uneven(world), "train.lr=5e-4", "train.grad_clip=0.5", resume=True) == 0
    out = capsys.readouterr().out
    assert f"continues after step {CUT} with changes: " in out
    assert "train.lr was 0.001 and is 0.0005" in out and "train.grad_clip was 1.0 and is 0.5" in out
    before, after = world.losses(source, "lr"), world.losses(run, "lr")
    assert after[:CUT] == before[:CUT]
    assert after[CUT:] == pytest.approx([rate / 2 for rate in before[CUT:]])


def test_every_setting_may_change_or_is_refused_by_its_name():
    names = settings(Config())
    allowed = {name for name in names if any(name == a or name.startswith(f"{a}.") for a in MAY_CHANGE)}
    assert not [a for a in MAY_CHANGE if not any(name == a or name.startswith(f"{a}.") for name in names)]
    for name in names:
        changed = {**names, name: "something else"}
        if name in allowed:
            assert require_same_run(names, changed, "there") == [f"{name} was {names[name]} and is something else"]
        else:
            with pytest.raises(CocomixError, match=rf"there cannot be resumed: {name} was .* and is something"):
                require_same_run(names, changed, "there")
    assert "train.seed" not in allowed and "train.micro_batch" in allowed and "model.n_embd" not in allowed


def test_a_name_that_only_begins_like_an_allowed_one_is_refused():
    with pytest.raises(CocomixError, match="train.lrx"):
        require_same_run({"train.lrx": 1}, {"train.lrx": 2}, "there")


def test_settings_survive_json_and_nothing_changed_is_no_change():
    names = settings(Config())
    assert require_same_run(json.loads(json.dumps(names)), names, "there") == []
    assert require_same_run({**names, "old": 1}, {**names, "new": 2}, "there") == []


def test_settings_that_came_later_had_their_default_in_older_checkpoints():
    names = settings(Config())
    older = {name: value for name, value in names.items() if not name.startswith("distillation.")}
    assert require_same_run(older, names, "there") == []
    with pytest.raises(CocomixError, match="distillation.weight was 0.0 and is 1.0"):
        require_same_run(older, {**names, "distillation.weight": 1.0}, "there")
    of_labels = {"the labels' teacher": "t"}
    assert require_same_run(of_labels, {**of_labels, "the labels' labels_by": "attribution"}, "there") == []
    with pytest.raises(CocomixError, match="the labels' labels_by was attribution and is activation"):
        require_same_run(of_labels, {**of_labels, "the labels' labels_by": "activation"}, "there")


def test_settings_of_earlier_names_are_compared_by_their_current_ones():
    names = settings(Config())
    older = {name.replace("concept_labels.", "labels."): value for name, value in names.items()}
    assert older != names and require_same_run(older, names, "there") == []
    changes = require_same_run({**older, "labels.cache": "here"}, names, "there")
    assert changes == ["concept_labels.cache was here and is None"]


# ---------------------------------------------------------------------------------------------- several processes

ON_TWO = {
    "0": stage(0),
    "1": stage(1),
    "2": stage(2),
    "3": stage(3),
    "bf16-1": [*stage(1), BF16],
    "bf16-3": [*stage(3), BF16],
    "offloaded-3": [*stage(3), OFFLOADED],
}
ON_FOUR = {"2": stage(2), "3": stage(3), "bf16-2": [*stage(2), BF16]}
# (ranks and settings of the first part, ranks and settings of the second)
SAME = [(2, name, 2, name) for name in ON_TWO] + [(4, name, 4, name) for name in ON_FOUR]
OTHER = [
    (2, "3", 4, "3"),
    (2, "0", 4, "2"),
    (2, "1", 4, "3"),
    (2, "bf16-1", 4, "bf16-2"),
    (2, "offloaded-3", 4, "2"),
    (4, "3", 2, "3"),
    (4, "3", 2, "0"),
    (4, "2", 2, "3"),
    (4, "2", 2, "offloaded-3"),
    (4, "bf16-2", 2, "bf16-3"),
]
SETTINGS = {2: ON_TWO, 4: ON_FOUR}
SPLIT = {2: "train.micro_batch=2", 4: "train.micro_batch=1"}


def name_of(ranks, name):
    return f"on-{ranks}-{name}"


@pytest.fixture(scope="module")
def parts(world):
    """All runs above: the whole ones, and those that were resumed."""
    for ranks, runs in SETTINGS.items():
        world.train_on(
            ranks,
            {
                name_of(ranks, name): [*uneven(world), SPLIT[ranks], "train.keep_checkpoints=3", *more]
                for name, more in runs.items()
            },
        )
    for ranks, runs in SETTINGS.items():
        second = {}
        for first in SAME + OTHER:
            if first[2] == ranks:
                run = world.cut(name_of(*first[:2]), f"{name_of(*first[:2])}-{name_of(*first[2:])}", CUT)
                second[run] = [*uneven(world), SPLIT[ranks], *runs[first[3]], "--resume"]
        world.train_on(ranks, second)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("case", SAME, ids=str)
def test_the_same_ranks_and_stage_go_on_bit_for_bit(parts, case):
    assert_equal_runs(parts, name_of(*case[:2]), f"{name_of(*case[:2])}-{name_of(*case[2:])}")


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER, ids=str)
def test_other_ranks_and_stages_go_on_with_the_same_trajectory(parts, case):
    run = f"{name_of(*case[:2])}-{name_of(*case[2:])}"
    assert json.loads((parts.folder / run / "run.json").read_text())["world_size"] == case[2]
    assert_same_trajectory(parts, run, name_of(*case[:2]), **bounds(SETTINGS[case[2]][case[3]]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_one_process_goes_on_with_what_several_left(parts, ranks):
    source = name_of(ranks, "3")
    run = parts.cut(source, f"{source}-alone", CUT)
    assert parts.train(run, *uneven(parts), *stage(0), "train.micro_batch=8", resume=True) == 0
    assert_same_trajectory(parts, run, source)


@pytest.mark.slow
def test_no_rank_writes_more_than_its_share(parts):
    """A quarter of three fp32 numbers a parameter, padding aside."""
    parameters = json.loads((parts.folder / name_of(4, "3") / "run.json").read_text())["parameters"]
    for name in ("2", "3"):
        files = sorted((parts.folder / name_of(4, name) / "checkpoints/step-00000012/state").iterdir())
        assert len(files) == 4
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) < 12 * parameters / 4 + 30_000  # names and random states
