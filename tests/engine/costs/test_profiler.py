"""`cocomix profile`: parts that add up, slowdowns put in on purpose, FLOPs against PyTorch's counter, and figures."""

import contextlib
import functools
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flop_helpers import count_flops
from run_helpers import PARTITION_ALL, World, environment
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import SparseAutoencoder
from cocomix.cli import main
from cocomix.core import machine
from cocomix.core.config import load_config
from cocomix.core.errors import CocomixError
from cocomix.core.methods import CONCEPT_LABELS
from cocomix.core.shapes import TeacherShape
from cocomix.costs import profile_inputs, profile_session, profile_text, profiler, step_parts
from cocomix.costs.profile_session import ALONE, CACHED, NTP, ONLINE, Options, OutOfMemory, Profile
from cocomix.costs.step_parts import PARTS
from cocomix.distributed.ranks import process_group

CPU = torch.device("cpu")
LENGTH, LATENTS, VOCABULARY, BUCKET = 32, 256, 512, 10**6
CONFIG = f"""
out: OUT
data: {{folder: "${{out}}/data", seq_len: {LENGTH}}}
model: {{n_embd: 64, n_layer: 4, n_head: 4, concept_dim: {LATENTS}, concept_topk: 8, insert_layer: 1}}
teacher: {{model: "${{out}}/teacher", sae: "${{out}}/sae", layer: 1, label_topk: 3}}
train: {{global_batch: 8, micro_batch: 2, warmup_steps: 3, tensorboard: false, timeout_minutes: 1}}
deepspeed: {{zero_optimization: {{reduce_bucket_size: {BUCKET}}}}}
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config with a small teacher, and no token files."""
    folder = tmp_path_factory.mktemp("profile")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=128, n_embd=48, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None
        )
    ).save_pretrained(folder / "teacher")
    weights = [torch.randn(LATENTS, 48) for _ in range(2)]
    SparseAutoencoder(weights[0], torch.zeros(LATENTS), torch.zeros(48), weights[1], 8, normalize=True).save(
        folder / "sae"
    )
    (folder / "config.yaml").write_text(CONFIG.replace("OUT", str(folder)))
    return folder / "config.yaml"


@pytest.fixture(scope="module", autouse=True)
def small_and_steady():
    """The chip's rate is of no interest to most tests, and threads that wait for busy cores spoil times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine._PRODUCT_SIDE, "cpu", 128)
        yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def profiled(config_file, *overrides, **options):
    """A profile of the config, ready to be measured."""
    config = load_config(config_file, list(overrides))
    with process_group(1) as ranks:
        profile = Profile(config, Options(**{"vocab_size": VOCABULARY, **options}), ranks)
        try:
            yield profile
        finally:
            profile.close()


@pytest.fixture(scope="module")
def shared(config_file):
    """One profile for all tests that put it back as it was."""
    with profiled(config_file) as profile:
        yield profile


def measured(profile, rounds=3, names=None) -> dict:
    """The figures of the methods in new rounds."""
    methods, profile.rounds = profile.methods, rounds
    profile.methods = {name: methods[name] for name in names or methods}
    for rates in profile.rates.values():
        rates.clear()
    for method in profile.methods.values():
        method.seconds.clear(), method.update_seconds.clear(), method.parts.clear()
    try:
        profile.measure()
        return profiler.results(profile).methods
    finally:
        profile.methods = methods


# Slowdowns put in on purpose


class Clock:
    """Time that passes in pauses, and by a tick at each look; in place of the profiler's clock."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """A profiler whose steps take no time but the pauses on this clock."""
    clock = Clock()
    for module in (step_parts, profile_session):
        monkeypatch.setattr(module, "time", clock)
    return clock


def pausing(function, clock, seconds=1.0):
    """The function, after a pause."""

    def slow(*args, **kwargs):
        clock.sleep(seconds)
        return function(*args, **kwargs)

    return slow


class _PauseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.sleep(1.0)
        return gradient, None


def pausing_backward(function, clock):
    """The function, whose backward pass begins with a pause."""

    def slow(*args, **kwargs):
        out = function(*args, **kwargs)
        if torch.is_tensor(out):
            return _PauseBackward.apply(out, clock)
        return out._replace(values=_PauseBackward.apply(out.values, clock), loss=_PauseBackward.apply(out.loss, clock))

    return slow


def attribute(path):
    """A function from a profile and a method to (owner, name) of what `path` names below one of their parts."""

    def find(profile, method):
        owner = {
            "model": method.student.engine.module,
            "engine": method.student.engine,
            "step": method.train_step,
            "tokens": profile.split,
            "teacher": profile.teachers.get(CONCEPT_LABELS),
        }
        first, *between, name = path.split(".")
        return functools.reduce(lambda o, n: o[int(n)] if n.isdigit() else getattr(o, n), between, owner[first]), name

    return find


SLOWDOWNS = [
    (NTP, "model.transformer.h.0.mlp.forward", pausing, "h blocks", 1),
    (NTP, "model.transformer.h.3.forward", pausing, "f blocks", 1),
    (NTP, "model.transformer.h.0.forward", pausing_backward, "h blocks, backward", 1),
    (NTP, "model.lm_head.forward", pausing, "LM head and loss", 1),
    (NTP, "engine.optimizer.step", pausing, "optimizer", 1),
    (CACHED, "model.transformer.wte.forward", pausing, "embeddings", 1),
    (CACHED, "model.transformer.wte.forward", pausing_backward, "embeddings, backward", 1),
    (CACHED, "model.transformer.h.0.forward", pausing_backward, "h blocks, backward", 1),
    (CACHED, "model.transformer.concept_predictor.forward", pausing, "concept head", 1),
    (CACHED, "model.transformer.concept_predictor.forward", pausing_backward, "concept head, backward", 2),
    (CACHED, "model.transformer.compress_layer.forward", pausing, "mixing", 1),
    (CACHED, "model.transformer.compress_layer.forward", pausing_backward, "mixing, backward", 1),
    (CACHED, "model.transformer.h.1.forward", pausing, "f blocks", 1),
    (CACHED, "model.transformer.h.2.attn.forward", pausing_backward, "f blocks, backward", 1),
    (CACHED, "model.transformer.h.3.forward", pausing_backward, "f blocks, backward", 1),
    (CACHED, "model.transformer.ln_f.forward", pausing, "LM head and loss", 1),
    (CACHED, "model.transformer.ln_f.forward", pausing_backward, "LM head and loss, backward", 1),
    (CACHED, "engine.allreduce_gradients", pausing, "optimizer", 1),
    (CACHED, "tokens.window", pausing, "other", 2),  # windows in a micro batch
    (ONLINE, "teacher.labels", pausing, "teacher and labels", 1),
    (ONLINE, "model.transformer.h.2.forward", pausing, "f blocks", 1),
]


@pytest.mark.parametrize(
    ("name", "path", "slow", "part", "times"), SLOWDOWNS, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_slowdown_shows_in_its_part_and_in_the_ratio(shared, clock, name, path, slow, part, times):
    """Every other part takes no time, but for an optimizer step of a second."""
    mixed = CACHED if name == NTP else name
    with pytest.MonkeyPatch.context() as patch:
        for method in (shared.methods[NTP], shared.methods[CACHED]):
            optimizer = method.student.engine.optimizer
            patch.setattr(optimizer, "step", pausing(optimizer.step, clock))
        owner, attr = attribute(path)(shared, shared.methods[name])
        patch.setattr(owner, attr, slow(getattr(owner, attr), clock))
        found = measured(shared, rounds=1, names=(NTP, mixed))
    expected = dict.fromkeys(PARTS, 0) | {"optimizer": 1}
    expected[part] += times
    assert found[name].parts == pytest.approx(expected, abs=1e-3)
    assert found[name].parts_s == pytest.approx(1 + times, abs=1e-3)
    assert found[name].step_s.median == pytest.approx(1 + times, abs=1e-3)
    assert found[name].update_s.median == pytest.approx(expected["optimizer"], abs=1e-3)
    # in training 4 micro batches share the optimizer step
    step = expected["optimizer"] + 4 * (1 + times - expected["optimizer"])
    ratio = 1 if path.startswith("tokens") else 1 / step if name == NTP else step  # all methods read the same tokens
    assert found[mixed].ratio.median == pytest.approx(ratio, rel=1e-3)


@pytest.mark.slow
def test_parts_add_up_to_the_step_and_ratios_are_those_of_a_clock(shared):
    """In real time. Known pauses make up most of every step, so that another clock finds the same in other steps."""
    lm_head = shared.methods[NTP].student.engine.module.lm_head
    predictor = shared.methods[CACHED].student.engine.module.transformer.concept_predictor
    names = (NTP, CACHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head, "forward", pausing(lm_head.forward, time, 1.0))
        patch.setattr(predictor, "forward", pausing(predictor.forward, time, 1.6))
        found = measured(shared, rounds=1, names=names)
        apart = {name: clocked(shared.methods[name].step) for name in names}
    update = {name: shared.methods[name].update_seconds[0] for name in names}
    for name, figures in found.items():
        assert figures.step_s.median == pytest.approx(apart[name], rel=0.03)
        assert figures.parts_over_step.median == pytest.approx(1, abs=0.03)
        assert figures.parts_s == pytest.approx(figures.step_s.median, rel=0.03)
    training = {name: 4 * (apart[name] - update[name]) + update[name] for name in names}
    assert found[CACHED].ratio.median == pytest.approx(training[CACHED] / training[NTP], rel=0.03)


def clocked(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_marks_leave_nothing_behind(shared):
    measured(shared, rounds=1)
    for method in shared.methods.values():
        engine = method.student.engine
        assert not {"backward", "step"} & set(vars(engine)) and "add_to" not in vars(method.train_step.supervision)
        for module in engine.module.transformer.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.distributed.all_reduce.__module__ == "torch.distributed.distributed_c10d"
    assert not isinstance(torch.distributed.all_reduce, functools.partial)


def test_recomputed_blocks_belong_to_the_backward_pass(config_file, clock):
    with (
        profiled(config_file, "train.activation_checkpointing=true", labels=(CACHED,)) as profile,
        pytest.MonkeyPatch.context() as patch,
    ):
        for block in profile.methods[CACHED].student.engine.module.transformer.h:
            patch.setattr(block.mlp, "forward", pausing(block.mlp.forward, clock))
        parts = measured(profile, rounds=1)[CACHED].parts
    expected = {"h blocks": 1, "h blocks, backward": 1, "f blocks": 3, "f blocks, backward": 3}
    assert parts == pytest.approx(dict.fromkeys(PARTS, 0) | expected, abs=1e-3)


OF_PAUSES = {"pause_tokens": ("mixing", pausing), "h.1": ("f blocks", pausing)}
OF_PREDICTION = {
    "concept_predictor": ("concept head, backward", pausing_backward),
    "h.1": ("f blocks", pausing),
    "h.0": ("h blocks, backward", pausing_backward),
}


@pytest.mark.parametrize(
    ("mixing", "slow", "method", "expected"),
    [
        ("pause", OF_PAUSES, ALONE, {"mixing": 1, "f blocks": 1}),
        ("predict", OF_PREDICTION, CACHED, {"concept head, backward": 1, "f blocks": 1, "h blocks, backward": 1}),
    ],
)
@pytest.mark.parametrize("insert_layer", [1, 0])
def test_other_methods_have_their_parts(config_file, clock, mixing, slow, method, expected, insert_layer):
    if insert_layer == 0:
        slow, expected = (
            {key: value for key, value in found.items() if "h.0" != key and "h blocks" not in key}
            for found in (slow, expected)
        )
    with (
        profiled(
            config_file,
            f"model.insert_layer={insert_layer}",
            f"model.mixing={mixing}",
            labels=None if method == ALONE else (method,),
        ) as profile,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert list(profile.methods) == [NTP, method]
        transformer = profile.methods[method].student.engine.module.transformer
        for path, (_, how) in slow.items():
            module = transformer.get_submodule(path)
            patch.setattr(module, "forward", how(module.forward, clock))
        found = measured(profile, rounds=1)[method]
    assert found.parts == pytest.approx(dict.fromkeys(PARTS, 0) | expected, abs=1e-3)


@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_a_student_without_h_blocks_has_all_other_parts(config_file, clock, mixing):
    slow = {
        "wte": ("embeddings", pausing),
        "concept_predictor": ("concept head, backward", pausing_backward),
        "compress_layer": ("mixing", pausing),
        "h.0": ("f blocks", pausing),
        "ln_f": ("LM head and loss", pausing),
    }
    with (
        profiled(
            config_file, "model.insert_layer=0", f"model.mixing={mixing}", "train.zero_stage=0", labels=(CACHED,)
        ) as profile,
        pytest.MonkeyPatch.context() as patch,
    ):
        transformer = profile.methods[CACHED].student.engine.module.transformer
        for path, (_, how) in slow.items():
            module = transformer.get_submodule(path)
            patch.setattr(module, "forward", how(module.forward, clock))
        found = measured(profile, rounds=1)
    expected = dict.fromkeys(PARTS, 0) | {part: 1 for part, _ in slow.values()} | {"concept head, backward": 2}
    assert found[CACHED].parts == pytest.approx(expected, abs=1e-3)
    assert found[NTP].parts["h blocks"] == found[NTP].parts["h blocks, backward"] == 0


# FLOPs and memory


@pytest.fixture(scope="module")
def longer(config_file):
    """A profile whose windows are long enough for ends not to matter; every method takes the same steps."""
    with profiled(config_file, "data.seq_len=128") as profile:
        yield profile


def test_flops_are_those_that_pytorchs_counter_sees_in_a_step(longer):
    for name, method in longer.methods.items():
        counted, seen = count_flops(method.step)
        assert method.flops_per_token * method.windows * 128 == pytest.approx(counted, rel=0.03), name
        assert ("cocomix.topk_linear" in seen) == (name == ONLINE)
        assert ("cocomix.concept_head_backward" in seen) == (name != NTP)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.mixing=pause"],
        ["model.mixing=predict"],
        ["teacher.labels_by=activation"],
        ["model.mixing=none", "distillation.weight=0.5"],
        ["model.mixing=none", "distillation.weight=0.5", "distillation.top_k=null"],
        ["distillation.weight=0.5", "distillation.top_k=8"],
    ],
    ids=" ".join,
)
def test_other_methods_flops_are_those_that_pytorchs_counter_sees_in_a_step(config_file, overrides):
    """A student that is distilled reads whole logits of the teacher once and of its own three times."""
    with profiled(config_file, "data.seq_len=128", *overrides) as profile:
        has_cache = "distillation.top_k=null" not in overrides
        kinds = [ALONE] if "model.mixing=pause" in overrides else [CACHED, ONLINE] if has_cache else [ONLINE]
        assert list(profile.methods) == [NTP, *kinds]
        for name, method in profile.methods.items():
            counted, _ = count_flops(method.step)
            assert method.flops_per_token * method.windows * 128 == pytest.approx(counted, rel=0.03), name


def test_methods_have_titles_and_what_they_cannot_have_is_refused(config_file):
    distilled = ["model.mixing=none", "distillation.weight=0.5"]
    with profiled(config_file, *distilled, "data.seq_len=16") as profile:
        titles = [method.title for method in profile.methods.values()]
        assert titles == [
            "NTP",
            "NTP with distillation, cached top-32 soft targets",
            "NTP with distillation, online top-32 soft targets",
        ]
        settings = profiler.results(profile).settings if profile.measure() is None else None
        assert settings.method == "NTP with distillation" and settings.learns_from == ["top-32 soft targets"]
        text = profile_text.describe_profile(profiler.results(profile))
        assert "mixing none, distillation and top-32 soft targets, fp32" in text and "with concepts" not in text
        assert "the break-even saving." in text and "the paper reports" not in text
    with profiled(config_file, "model.concept_residual=true", labels=(CACHED,)) as profile:
        assert [method.title for method in profile.methods.values()] == ["NTP", "CoCoMix with residual, cached labels"]
        profile.measure()
        found = profiler.results(profile)
        assert found.settings.method == "CoCoMix with residual" and found.student.concept_residual
        assert found.paper_saving is None  # the paper measured its own form
    for overrides, options, message in (
        (["model.mixing=pause"], {"labels": (CACHED,)}, "the method .pause tokens. learns from no teacher: leave out"),
        ([*distilled, "distillation.top_k=null"], {"labels": (CACHED,)}, "whole distributions are never cached"),
        ([*distilled, "teacher.model=null"], {"labels": (ONLINE,)}, "online soft targets need a teacher: set tea"),
        (["model.mixing=none"], {}, "leaves nothing to compare"),
        (
            [],
            {"against": ("transformers",), "labels": (CACHED,)},
            "knows no competitors; run benchmarks",
        ),
        (["model.mixing=predict"], {"against": ("public",)}, "--against public needs model.mixing=interleave or add"),
        (
            ["model.concept_residual=true"],
            {"against": ("public",)},
            "public needs .*without concept_residual",
        ),
        (["teacher.labels_by=activation"], {"against": ("public",)}, "--against public needs .*by attribution"),
        (["train.zero_stage=3"], {"against": ("transformers",)}, "needs train.zero_stage 0, 1 or 2"),
    ):
        with pytest.raises(CocomixError, match=message), profiled(config_file, *overrides, **options):
            pass


def test_the_product_rate_is_that_of_counted_operations(monkeypatch):
    now, multiply = 0.0, torch.mm

    def clocked_product(left, right, out):
        nonlocal now
        now += 2 * len(left) * left.shape[1] * right.shape[1] / 4e9
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", clocked_product)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    product = machine.ProductRate(CPU, torch.float32, side=64)
    assert [product.measure() for _ in range(3)] == pytest.approx([4e9] * 3)


def test_memory_counts_what_stays_and_what_is_held_at_once():
    def call():
        torch.empty(2**20, dtype=torch.uint8), torch.empty(2**20, dtype=torch.uint8)
        return torch.empty(2**19, dtype=torch.uint8)

    assert machine.peak_bytes(call, CPU)[0] == 2**21
    kept, result = machine.kept_bytes(call, CPU)
    assert kept == 2**19 and len(result) == 2**19
    assert machine.kept_bytes(lambda: result[1:], CPU)[0] == 0  # the memory is not new


def test_peak_memory_holds_weights_gradients_and_adams_state(shared):
    """Beside DeepSpeed's bucket."""
    peaks = {name: method.peak_bytes for name, method in shared.methods.items()}
    frozen = shared.teachers[CONCEPT_LABELS]
    teacher = 4 * sum(p.numel() for module in (frozen.model, frozen.sae) for p in module.parameters())
    for name in (NTP, CACHED):
        student = shared.methods[name].student
        weights = 4 * sum(p.numel() for p in student.engine.module.parameters())
        # the weights and DeepSpeed's copy of them, and Adam's two moments; gradients only during the step
        assert student.kept_bytes == pytest.approx(4 * weights, rel=0.01)
        assert 5 * weights < peaks[name] - 4 * BUCKET < 5 * weights + 10 * 2**20
    assert shared.teacher_bytes == pytest.approx(teacher, rel=0.1)
    assert peaks[CACHED] < peaks[ONLINE] - 0.99 * teacher < peaks[CACHED] + 10 * 2**20


# Inputs


def test_all_modes_read_the_same_random_tokens(longer):
    batches = [next(method.batches) for method in longer.methods.values()]
    assert all(batch["input_ids"].equal(batches[0]["input_ids"]) for batch in batches)
    assert [set(batch) for batch in batches] == [{"input_ids"}, {"input_ids", "concept_labels"}, {"input_ids"}]
    assert batches[0]["input_ids"].max() < VOCABULARY and batches[0]["input_ids"].unique().numel() > 50


def test_token_files_are_read_where_there_are_some(tmp_path, capsys):
    world = World(tmp_path / "world")
    world.add_teacher()
    out = tmp_path / "out.json"
    assert (
        main(
            [
                "profile",
                str(world.config),
                "--rounds",
                "1",
                "--mixing",
                "add",
                "--json",
                str(out),
                "train.micro_batch=8",
                "model.mixing=none",
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert found["settings"]["tokens"] == "files" and found["settings"]["teacher"] == "config"
    assert (found["settings"]["mixing"], found["settings"]["training_accumulation"]) == ("add", 1)
    assert found["student"]["vocab_size"] == 300
    text = capsys.readouterr().out
    assert "token files, the config's teacher" in text and "mixing add" in text


@pytest.mark.slow
def test_a_random_teacher_has_the_shape_of_gpt2(config_file, capsys):
    assert (
        main(
            [
                "profile",
                str(config_file),
                "teacher.model=null",
                "--random-teacher",
                "--vocab-size",
                "600",
                "--rounds",
                "1",
                "data.seq_len=32",
                "--labels",
                "online",
            ]
        )
        == 0
    )
    assert "a teacher of random weights" in capsys.readouterr().out
    config = load_config(config_file, [])
    teacher = profile_inputs.build_teachers(config, CPU, 600, at_random=True)[CONCEPT_LABELS]
    assert teacher.shape == TeacherShape(768, 12, 1, 50257, LATENTS)
    assert sum(p.numel() for p in teacher.model.parameters()) == pytest.approx(124.4e6, rel=1e-3)


# Figures


def fake_profile(**methods):
    """A profile with methods of known times: (seconds of steps, of updates, windows)."""
    made = {}
    for name, (seconds, updates, windows, of) in methods.items():
        made[name] = SimpleNamespace(
            name=name,
            title=name,
            of=of,
            windows=windows,
            seconds=seconds,
            update_seconds=updates,
            parts=[],
            peak_bytes=2**30,
            flops_per_token=2e6,
            teacher_flops_per_token=0,
        )
    config = SimpleNamespace(train=SimpleNamespace(micro_batch=4, precision="fp32"))
    return SimpleNamespace(
        methods=made,
        config=config,
        training_accumulation=5,
        options=Options(accumulation=2),
        rates={"fp32": [1e9, 2e9, 3e9]},
        shape=SimpleNamespace(seq_len=10),
        ranks=SimpleNamespace(world=2),
    )


def test_figures_are_for_a_training_step_of_the_measured_times():
    profile = fake_profile(
        ntp=([1.2, 1.2, 1.2], [0.2] * 3, 4, None),
        cached=([2.3, 2.1, 9.0], [0.3, 0.1, 0.1], 4, None),
        public=([3.0] * 3, [0.0] * 3, 1, "cached"),
    )
    profile.methods["cached"].flops_per_token = 3e6
    ntp, cached, public = (profiler._figures(profile, method) for method in profile.methods.values())
    # 5 micro batches of 4 windows of 10 tokens and an update; measured were 2 of them and one
    assert ntp.tokens_per_s == pytest.approx(2 * 200 / (0.5 * 5 + 0.2))
    assert cached.ratio.median == pytest.approx((1.0 * 5 + 0.3) / (0.5 * 5 + 0.2))
    assert cached.efficiency == pytest.approx(1.5 / cached.ratio.median)
    assert cached.break_even_saving == pytest.approx(1 - 1 / cached.ratio.median)
    assert cached.mfu == pytest.approx(3e6 * (200 / (1.0 * 5 + 0.3)) / 2e9)
    assert public.slower.median == pytest.approx(3 / 2 * 20 / 5.3)  # one window at a time
    assert ntp.ratio is None and ntp.efficiency is None and cached.slower is None


def test_arithmetic_is_read_against_the_product_rate_of_its_own_precision():
    profile = fake_profile(ntp=([1.0] * 3, [0.0] * 3, 4, None), online=([4.0] * 3, [0.0] * 3, 4, None))
    profile.config.teacher = SimpleNamespace(dtype="bf16")
    profile.rates["bf16"] = [8e9, 8e9, 8e9]
    profile.methods["online"].flops_per_token, profile.methods["online"].teacher_flops_per_token = 11e6, 8e6
    ntp, online = (profiler._figures(profile, method) for method in profile.methods.values())
    floor = 3e6 / 2e9 + 8e6 / 8e9
    assert online.mfu == pytest.approx(floor * 40 / 2)  # two micro batches of 40 tokens in four seconds
    assert online.ideal_ratio == pytest.approx(floor / (2e6 / 2e9))
    assert online.efficiency == pytest.approx(online.ideal_ratio / 4)


def test_a_teacher_of_another_precision_has_a_product_rate_of_its_own(config_file):
    with profiled(config_file, "teacher.dtype=bf16") as profile:
        profile.measure()
        found = profiler.results(profile)
    assert set(profile.rates) == {"fp32", "bf16"} and found.settings.teacher_precision == "bf16"
    rate = found.teacher_product_flops_per_s
    assert rate and rate != found.product_flops_per_s
    text = profile_text.describe_profile(found)
    assert "a large fp32 product runs at" in text and "a large bf16 product runs at" in text


def test_the_breakdown_adds_up_whatever_single_rounds_took():
    rounds = [dict.fromkeys(PARTS, 0.0) | {"optimizer": a, "other": b} for a, b in ((1, 3), (2, 2), (5, 15))]
    profile = fake_profile(ntp=([4, 4, 10], [0.0] * 3, 4, None))
    profile.methods["ntp"].parts = rounds
    found = profiler._figures(profile, profile.methods["ntp"])
    assert found.parts_s == 4 and sum(found.parts.values()) == pytest.approx(4)
    assert found.parts["optimizer"] == pytest.approx(4 * (1 / 4 + 1 / 2 + 1 / 4) / 3)
    assert found.parts_over_step.median == 1


def test_the_table_and_the_file_hold_the_same_figures(config_file, tmp_path, capsys):
    out, folder = tmp_path / "new" / "out.json", tmp_path / "traces"
    assert (
        main(
            [
                "profile",
                str(config_file),
                "--vocab-size",
                str(VOCABULARY),
                "--rounds",
                "2",
                "--steps",
                "2",
                "--labels",
                "cached",
                "--accumulation",
                "2",
                "--json",
                str(out),
                "--trace",
                str(folder),
            ]
        )
        == 0
    )
    found, text = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found["methods"]) == ["ntp", "cached"] and list(found["methods"]["cached"]["parts"]) == list(PARTS)
    cached = found["methods"]["cached"]
    row = next(line for line in text.splitlines() if line.startswith("CoCoMix, cached labels"))
    for figure in (
        f"{cached['tokens_per_s']:,.0f}",
        f"{cached['step_s']['median'] * 1e3:,.1f}",
        f"{cached['ratio']['median']:.2f}",
        f"{cached['efficiency']:.2f}",
        f"{cached['break_even_saving']:.1%}",
        f"{cached['peak_memory_gib']:.2f}",
        f"{cached['mfu']:.0%}",
    ):
        assert figure in row.split()
    assert "21.5%" in text and "2 micro batches of 2 windows of 32 tokens" in text
    assert {*PARTS} <= {line.split("  ")[0] for line in text.splitlines()}
    assert {path.name for path in folder.iterdir()} == {"ntp.json.gz", "cached.json.gz"}
    with gzip.open(folder / "cached.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {*PARTS, "cocomix::concept_head", "cocomix::concept_head_backward"} <= names


# What does not work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.mixing=none"], "pass --mixing interleave"),
        (["teacher.model=null", "--labels", "online"], "online labels need a teacher"),
        (["teacher.model=null", "--labels", "both"], "--random-teacher"),
        (["data.tokenizer=somewhere/else"], "--vocab-size"),
        (["--vocab-size", "513"], "knows 512 ids but the tokens use 513"),
        (["model.concept_dim=128", "--vocab-size", "512"], "the SAE has 256 latents"),
    ],
)
def test_bad_input_is_one_line(config_file, capsys, arguments, message):
    assert main(["profile", str(config_file), "--rounds", "1", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cocomix profile: error: ") and message in error


def out_of_memory_above(limits):
    """In place of `Profile`: a method does not fit with more windows than its limit."""

    def build(config, options, ranks, windows):
        for name, most in limits.items():
            if windows.get(name, config.train.micro_batch) > most:
                raise OutOfMemory(name)
        return config.train.micro_batch, dict(windows)

    return build


def test_the_micro_batch_is_halved_until_all_fit(config_file, monkeypatch):
    config, ranks = load_config(config_file, ["train.micro_batch=8"]), SimpleNamespace(world=1)

    def fitted(fit=True, world=1, **limits):
        monkeypatch.setattr(
            profiler, "Profile", out_of_memory_above({name.replace("_", " "): most for name, most in limits.items()})
        )
        return profiler.fitting_profile(config, Options(fit=fit), SimpleNamespace(world=world))

    assert fitted(ntp=8) == (8, {})
    assert fitted(cached=3) == (2, {})
    assert fitted(public_cached=3) == (8, {"public cached": 2})
    assert fitted(online=4, public_online=1) == (4, {"public online": 1})
    for impossible in ({"cached": 0}, {"cached": 3, "fit": False}, {"cached": 3, "world": 2}):
        with pytest.raises(CocomixError, match="does not fit into memory"):
            fitted(**impossible)
    assert ranks.world == 1


def test_a_mode_that_runs_out_of_memory_is_named(config_file, monkeypatch):
    monkeypatch.setattr(profile_session.TrainStep, "__call__", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(OutOfMemory, match="ntp") as caught, profiled(config_file, labels=(CACHED,)):
        pass
    assert caught.value.__context__ is None  # no traceback that would hold tensors


# Several ranks, stages, and compiled blocks


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["train.zero_stage=2"], ["train.zero_stage=3", *PARTITION_ALL]])
def test_two_ranks_communicate(config_file, tmp_path, overrides):
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            Path(sys.executable).with_name("torchrun"),
            "--nproc-per-node",
            "2",
            "-m",
            "cocomix",
            "profile",
            str(config_file),
            "--vocab-size",
            str(VOCABULARY),
            "--rounds",
            "2",
            "--json",
            str(out),
            *overrides,
        ],
        env=environment(threads=1),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["settings"]["ranks"] == 2 and found["settings"]["training_accumulation"] == 2
    assert done.stdout.count("efficiency") == 1  # one rank talks
    for method in found["methods"].values():
        assert method["parts"]["communication"] > 0.02 * method["parts_s"]
        assert min(method["parts"][part] for part in ("h blocks", "f blocks, backward", "optimizer")) > 0


@pytest.mark.slow
def test_compiled_blocks_are_measured_as_they_run(config_file, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with profiled(config_file, "train.compile=true", labels=(CACHED,)) as profile:
        found = measured(profile)
    for name, figures in found.items():
        assert all(
            seconds > 0
            for part, seconds in figures.parts.items()
            if part != "teacher and labels" and not (name == NTP and part.startswith(("concept", "mixing")))
        )
