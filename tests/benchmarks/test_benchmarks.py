"""The kernel benchmarks: the public code's way against the reference, formulas against counts, the gate against wrong
results, interleaved rounds, and the programs end to end on tiny shapes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_all_close, run
from profile_helpers import method_results, profile_results
from torch.utils.flop_counter import FlopCounterMode

from cocomix.core.machine import peak_bytes
from cocomix.costs.profile_results import Spread
from cocomix.report import measurement_figures
from cocomix_kernels import FullTargets, TopTargets, reference

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the benchmarks are programs, not part of the package
import bench_attribution  # noqa: E402
import bench_concept_head  # noqa: E402
import bench_concept_mix  # noqa: E402
import bench_distillation  # noqa: E402
import bench_interleaved_attention  # noqa: E402
import bench_topk_linear  # noqa: E402
import gpu  # noqa: E402
import gpu_profiles  # noqa: E402
import harness  # noqa: E402
import machine  # noqa: E402
import public_way  # noqa: E402
import summary  # noqa: E402
import sweeps  # noqa: E402

CPU = torch.device("cpu")
SETTING = harness.Setting(CPU, "tiny")
FILES = [
    bench_concept_head,
    bench_topk_linear,
    bench_attribution,
    bench_concept_mix,
    bench_interleaved_attention,
    bench_distillation,
]
CASES = [case for file in FILES for case in file.cases(SETTING)]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.name}")


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


# The public code's way


def test_the_public_concept_head_is_the_reference():
    labels = harness.distinct_indices(9, 40, 3, CPU)
    grad = torch.randn(9, 40, dtype=torch.float64)

    def ours(*inputs):
        values, indices, loss = reference.concept_head(*inputs, 5, labels)
        return torch.zeros(9, 40, dtype=torch.float64).scatter(1, indices, values), loss

    def theirs(*inputs):
        masked, indices, loss = public_way.concept_head(*inputs, 5, labels)
        assert indices.equal(reference.concept_head(*inputs, 5)[1])
        return masked, loss

    inputs = doubles((9, 6), (40, 6), (40,))
    grads = [grad, torch.tensor(2.0)]
    assert_all_close(sum(run(theirs, inputs, grads), []), sum(run(ours, inputs, grads), []))
    assert public_way.concept_head(*inputs, 5)[2] is None


def test_the_public_encoder_is_the_reference():
    inputs, grad = doubles((9, 6), (40, 6), (40,)), torch.randn(9, 40, dtype=torch.float64)

    def ours(*inputs):
        values, indices = reference.topk_linear(*inputs, 30, relu=True)  # so many that some are negative
        return torch.zeros(9, 40, dtype=torch.float64).scatter(1, indices, values)

    expected = run(ours, inputs, [grad])
    assert (expected[0][0] > 0).sum(1).min() < 30
    assert_all_close(sum(run(lambda *i: public_way.sae_encode(*i, 30), inputs, [grad]), []), sum(expected, []))


def test_the_public_attribution_chooses_the_reference_labels_where_there_are_any():
    grad, decoder = doubles((9, 6), (40, 6))
    indices, values = harness.distinct_indices(9, 40, 5, CPU), torch.rand(9, 5, dtype=torch.float64)
    latents = torch.zeros(9, 40, dtype=torch.float64).scatter(1, indices, values)
    expected = reference.concept_attribution(values, indices, grad, decoder, 4)
    best, labels = public_way.attribution(latents, grad, decoder.t(), 4)
    assert (expected < 0).any() and (expected >= 0).any()
    assert torch.equal(torch.where(best > 0, labels, -1), expected)


def test_the_public_mix_is_the_reference():
    hidden, values, weight, bias, pre_bias, mean, std = inputs = doubles(
        (2, 5, 6), (2, 5, 3), (30, 6), (6,), (6,), (2, 5, 1), (2, 5, 1)
    )
    indices = harness.distinct_indices(10, 30, 3, CPU).view(2, 5, 3)

    def theirs(hidden, values, weight, *others):
        masked = torch.zeros(2, 5, 30, dtype=torch.float64).scatter(2, indices, values)
        return public_way.mix(hidden, masked, weight.t(), *others)

    def ours(hidden, values, *others):
        return reference.concept_mix(hidden, values, indices, *others)

    grads = doubles((2, 10, 6))
    assert_all_close(sum(run(theirs, inputs, grads), []), sum(run(ours, inputs, grads), []))


def test_the_public_attention_is_the_reference():
    inputs, grads = doubles(*[(2, 14, 3, 8)] * 3), doubles((2, 14, 3, 8))
    assert_all_close(
        sum(run(public_way.attention, inputs, grads), []), sum(run(reference.interleaved_attention, inputs, grads), [])
    )
    grads = doubles((2, 7, 3, 8))
    assert_all_close(
        sum(run(public_way.last_attention, inputs, grads), []),
        sum(run(lambda q, k, v: reference.interleaved_attention(q[:, 1::2], k, v), inputs, grads), []),
    )


@pytest.mark.parametrize("kind", [FullTargets, TopTargets])
def test_the_public_distillation_is_the_reference(kind):
    theirs = {FullTargets: public_way.distillation, TopTargets: public_way.top_distillation}[kind]
    x, weight, hidden, head = doubles((9, 6), (40, 6), (9, 5), (40, 5))
    labels = torch.randint(40, (9,))
    log_probs, ids = (hidden @ head.T).log_softmax(1).topk(4)
    targets = kind(*((hidden, head) if kind is FullTargets else (ids, log_probs)))
    grads = [torch.tensor(2.0), None, None]
    expected = run(lambda x, w: reference.linear_distillation(x, w, labels, targets, 0.3), [x, weight], grads)
    assert_all_close(
        sum(run(lambda x, w: theirs(x, w, labels, *targets, 0.3), [x, weight], grads), []), sum(expected, [])
    )


# Formulas


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.operation in ("concept_head", "topk_linear", "linear_distillation")],
    ids=lambda case: f"{case.operation}-{case.name}",
)
def test_flops_are_those_of_the_products_that_the_floor_does(case):
    step = case.contestants["floor"]()
    with FlopCounterMode(display=False) as counted:
        step(case.inputs())
    assert counted.get_total_flops() == case.flops and case.floor_factor == 1


@pytest.mark.parametrize("form", ["full", "concept"])
def test_attention_flops_count_the_pairs_that_the_reference_does_not_mask(form):
    batch, length, n_heads, size = 3, 5, 2, 4
    queries = torch.zeros(1, 10 if form == "full" else 5, 1, 10, dtype=torch.float64)
    keys, values = queries.new_zeros(1, 10, 1, 10), torch.eye(10).double()[None, :, None]
    shares = reference.interleaved_attention(queries, keys, values)
    pairs = (shares > 0).sum().item()
    forward = bench_interleaved_attention.attention_flops(batch, length, n_heads, size, form, False)
    assert forward == 2 * (2 * pairs * size) * batch * n_heads
    assert bench_interleaved_attention.attention_flops(batch, length, n_heads, size, form, True) == 3.5 * forward


def test_attribution_bytes_are_those_of_the_tensors_and_gathered_rows():
    inputs = bench_attribution.make_inputs(SETTING, torch.bfloat16)
    labels = inputs.indices[:, :4]
    moved = sum(t.nbytes for t in (inputs.values, inputs.indices, inputs.grad, inputs.decoder[inputs.indices], labels))
    (n, k), d = inputs.indices.shape, inputs.grad.shape[1]
    assert bench_attribution.moved_bytes(n, k, d, 4, 2) == moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mix_bytes_are_those_of_the_tensors_and_gathered_rows(dtype):
    setting = SimpleNamespace(shapes=SETTING.shapes, device=CPU, dtype=dtype)
    i = bench_concept_mix.make_inputs(setting, 16)
    gathered = i.weight[i.indices].nbytes
    read = sum(t.nbytes for t in (i.hidden, i.values, i.indices, i.bias, i.pre_bias, i.mean, i.std)) + gathered
    n, k = i.hidden.shape[0] * i.hidden.shape[1], i.values.shape[2]
    shape = n, k, 16, len(i.weight), dtype.itemsize
    assert bench_concept_mix.moved_bytes(*shape, False) == read + i.grad.nbytes  # the mix is as large as its gradient
    again = sum(t.nbytes for t in (i.values, i.indices, i.bias, i.pre_bias, i.mean, i.std)) + 2 * gathered
    again += i.grad.nbytes // 2
    written = sum(t.nbytes for t in (i.values, i.weight, i.bias, i.pre_bias, i.mean, i.std))
    assert bench_concept_mix.moved_bytes(*shape, True) == read + i.grad.nbytes + again + written


def test_sampled_floors_are_scaled_to_the_whole():
    make, factor = harness.copy_floor(2**20, SETTING)
    make()(None)
    assert factor * 2 * 2**16 == 2**20  # read and written
    make, factor = harness.product_floor(1e9, SETTING)
    with FlopCounterMode(display=False) as counted:
        make()(None)
    assert counted.get_total_flops() * factor == pytest.approx(1e9)


@pytest.mark.parametrize(
    ("set_bytes", "cache", "budget", "expected"),
    [
        (100, 50, 10**6, 2),  # two sets hold four caches' worth
        (100, 1000, 10**6, 16),  # not more than 16
        (100, 250, 10**6, 10),
        (101, 250, 10**6, 10),
        (99, 250, 10**6, 11),  # rounded up
        (10**5, 50, 10**6, 2),  # never one, so that no set comes twice in a row
        (100, 250, 450, 4),  # within the budget
        (100, 250, 99, 1),  # and one where not even that is there
    ],
)
def test_input_sets_exceed_the_cache_within_the_budget(set_bytes, cache, budget, expected):
    assert machine.rotating_sets(set_bytes, cache, budget) == expected


@given(st.integers(1, 60), st.integers(1, 200), st.data())
@settings(max_examples=50)
def test_distinct_indices_are_distinct_and_in_range(n, width, data):
    k = data.draw(st.integers(1, width))
    indices = harness.distinct_indices(n, width, k, CPU)
    assert indices.shape == (n, k) and indices.min() >= 0 and indices.max() < width
    assert all(len(set(row)) == k for row in indices.tolist())


@given(st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=50)
def test_sampled_rows_are_distinct_and_include_first_and_last(n, count):
    rows = harness.sampled(n, CPU, count).tolist()
    assert len(set(rows)) == len(rows) == min(n, count)
    assert rows[0] == 0 and (count == 1 or rows[-1] == n - 1)


def test_a_selection_that_misses_the_best_or_repeats_one_is_seen():
    exact = torch.tensor([[1.0, 5.0, 3.0, 4.0]], dtype=torch.float64)
    assert harness.selection_error(exact, torch.tensor([[3, 1]])) == 0
    assert harness.selection_error(exact, torch.tensor([[1, 2]])) == pytest.approx(1 / 41**0.5)
    assert harness.selection_error(exact, torch.tensor([[1, 1]])) == float("inf")


def test_ratios_are_of_medians_with_the_spread_of_the_rounds():
    found = summary.ratio([1, 2, 9], [2, 4, 3])
    assert found["median"] == 2 / 3
    assert found["p10"] == pytest.approx(0.5) and found["p90"] == pytest.approx(0.5 + 0.8 * 2.5)


def measured(**times):
    return {name: harness.Measured(times=values, peak=3 * 2**20, extra=2**20) for name, values in times.items()}


def row_of(case, name, results, on_gpu=True):
    return summary.figures(name, case, results, on_gpu)


def declared(**changes):
    case = CASES[0]
    return replace(case, **{"flops": 8e9, "bytes": 2e9, "targets": (), **changes})


def test_figures_are_rates_of_the_median_and_ratios_within_the_run():
    row = row_of(declared(), "torch", measured(torch=[0.002, 0.001, 0.004], floor=[0.001] * 3, public=[0.006] * 3))
    assert row["ms"]["median"] == 2 and row["rounds"] == 3
    assert row["tflops"] == pytest.approx(4) and row["gb_per_s"] == pytest.approx(1000)
    assert row["ratio_to_floor"]["median"] == pytest.approx(2)
    assert row["speedup_over_public"]["median"] == pytest.approx(3)
    assert row["peak_mib"] == 3 and row["extra_mib"] == 1
    alone = row_of(declared(bytes=None), "torch", measured(torch=[0.002]))
    assert alone["ratio_to_floor"] is None and alone["speedup_over_public"] is None and alone["gb_per_s"] is None
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    ("against", "at_most", "on_gpu", "met", "verdict"),
    [
        ("floor", 2.0, True, True, "met"),
        ("floor", 1.99, True, False, "NOT met"),
        ("public", 1 / 3, True, True, "met"),
        ("public", 0.33, True, False, "NOT met"),
        (summary.EXTRA_MEMORY, 1, True, True, "met"),
        (summary.EXTRA_MEMORY, 0.9, True, False, "NOT met"),
        ("flex", 1, True, None, "flex did not run"),
        ("floor", 9.0, False, None, "not applicable on a CPU"),
    ],
)
def test_targets_are_judged_on_a_gpu_alone(against, at_most, on_gpu, met, verdict):
    case = declared(targets=(summary.Target("torch", against, at_most), summary.Target("public", "floor", 1.0)))
    results = measured(torch=[0.002], floor=[0.001], public=[0.006])
    (target,) = row_of(case, "torch", results, on_gpu)["targets"]
    assert (target["met"], target["verdict"]) == (met, verdict)
    assert verdict in summary.table([row_of(case, "torch", results, on_gpu)], [])


def test_the_table_names_every_contestant_and_why_one_is_missing():
    results = measured(torch=[0.002], floor=[0.001], public=[0.006])
    rows = [row_of(declared(), name, results) for name in results]
    text = summary.table(rows, [(summary.title(rows[0]), "triton", "out of memory")])
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert set(lines) == {"contestant", "torch", "floor", "public", "triton"}
    assert "2.00 (2.00-2.00)" in lines["torch"] and "3.00 (3.00-3.00)" in lines["torch"]
    assert lines["triton"].endswith("out of memory")


# Sweeps

SWEPT = {
    bench_concept_head: "NdCk",
    bench_topk_linear: "NdCk",
    bench_concept_mix: "dCkT",
    bench_interleaved_attention: "T",
}


@pytest.mark.parametrize("file", SWEPT, ids=lambda file: file.__name__)
def test_a_sweep_varies_each_dimension_alone_by_five_values_that_the_figures_find(file):
    cases = file.sweep(SETTING)
    assert len({case.name for case in cases}) == len(cases) and not any(case.targets for case in cases)
    found = measurement_figures.sweeps(
        [row_of(case, name, measured(**{name: [0.001]})) for case in cases for name in case.contestants]
    )
    assert set(found) == set(SWEPT[file])
    for key, groups in found.items():
        drawn = {group[0]["contestant"] for group in groups}
        assert drawn >= {"torch", "public", "floor"}
        for group in groups:
            values = [row["shape"][key] for row in group]
            assert [value / values[2] for value in values] == list(sweeps.FACTORS)
        shapes = [
            {name: value for name, value in row["shape"].items() if name not in (key, "form")}
            for group in groups
            for row in group
        ]
        assert all(shape == shapes[0] for shape in shapes)


def test_the_inputs_of_a_sweep_have_its_shapes():
    shapes = {
        (case.shape["N"], case.shape["d"], case.shape["C"], case.shape["k"]): case.inputs()
        for case in bench_concept_head.sweep(SETTING)
    }
    for (n, d, c, k), inputs in shapes.items():
        assert inputs.x.shape == (n, d) and inputs.weight.shape == (c, d) and inputs.value_grad.shape == (n, k)
    for case in bench_interleaved_attention.sweep(SETTING):
        assert case.inputs().concept_q.shape[1] == case.shape["T"]


def test_sweeps_on_a_gpu_start_where_the_public_way_still_fits():
    on_gpu = harness.Setting(torch.device("cuda:0"), "short")
    assert sweeps.base(on_gpu) == replace(harness.PAPER, tokens=harness.PAPER.tokens // 4)
    assert max(case.shape["N"] for case in bench_concept_head.sweep(on_gpu)) == harness.PAPER.tokens
    assert not any("compiled" in case.contestants for case in bench_concept_head.sweep(on_gpu))


# Measuring


@pytest.mark.parametrize(("running", "expected"), [("1/99", 4), ("3/99", 4), ("6/99", 3), ("9/99", 1), ("20/99", 1)])
def test_threads_are_the_cores_that_are_free(monkeypatch, running, expected):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine.Path, "read_text", lambda self: f"0.1 0.2 0.3 {running} 4242\n")
    assert machine.free_cores() == expected


def test_peak_memory_counts_what_is_alive_at_once():
    def two_and_one():
        torch.empty(2**20, dtype=torch.uint8), torch.empty(2**20, dtype=torch.uint8)
        return torch.empty(2**19, dtype=torch.uint8)

    peak, result = peak_bytes(two_and_one, CPU)
    assert peak == 2**21 and len(result) == 2**19


class LowPrecision(harness.Setting):
    """Tiny shapes in the dtype of a GPU."""

    dtype = torch.bfloat16


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_every_contestant_is_right_in_bfloat16(file):
    for case in file.cases(LowPrecision(CPU, "tiny")):
        inputs = case.inputs()
        truth = case.truth(inputs)
        for name, make in case.contestants.items():
            outputs = make()(inputs)
            found = {} if outputs is None else case.errors(inputs, truth, outputs)
            assert all(error <= case.tolerance == 2e-2 for error in found.values()), (case.name, name, found)


@EVERY_CASE
def test_every_contestant_is_right_and_no_wrong_result_passes_the_gate(case):
    torch.manual_seed(1)
    inputs = case.inputs()
    truth = case.truth(inputs)
    for name, make in case.contestants.items():
        outputs = make()(inputs)
        if outputs is None:
            continue
        found = case.errors(inputs, truth, outputs)
        assert all(error <= case.tolerance for error in found.values()), (name, found)
        for wrong in outputs:
            if wrong in ("best", "indices"):  # not part of the result; checked through what they select
                continue
            spoiled = outputs | {wrong: spoil(outputs[wrong])}
            errors = case.errors(inputs, truth, spoiled)
            assert not all(error <= case.tolerance for error in errors.values()), (name, wrong, errors)


def spoil(tensor):
    """One percent wrong everywhere, or other indices."""
    return tensor.roll(1, 0) if not tensor.is_floating_point() else tensor * 1.01


def fake(contestants, tolerance=1e-3, floor_factor=1.0):
    """A case whose inputs are numbered and whose truth is one."""
    numbers = iter(range(100))
    return replace(
        CASES[0],
        inputs=lambda: SimpleNamespace(number=next(numbers), data=torch.zeros(2**16)),
        contestants={name: lambda step=step: step for name, step in contestants.items()},
        truth=lambda _: 1.0,
        errors=lambda _, truth, outputs: {"out": abs(outputs["out"].item() - truth)},
        tolerance=tolerance,
        floor_factor=floor_factor,
    )


def test_rounds_alternate_between_the_contestants_and_inputs_rotate(monkeypatch):
    calls = []

    def contestant(name):
        def step(inputs):
            calls.append((name, inputs.number))
            return {"out": torch.ones(())}

        return step

    monkeypatch.setitem(harness.ROUNDS, "tiny", (3, 3))
    results = harness.measure(fake({name: contestant(name) for name in "abc"}), SETTING)
    rounds = calls[6:]  # after a gate and a memory run of each
    assert "".join(name for name, _ in rounds) == "abcabccbaabc"
    assert all(len(result.times) == 3 for result in results.values())
    assert all(one != two for (_, one), (_, two) in zip(rounds, rounds[1:], strict=False))
    assert {number for _, number in calls[:6:2]} == {0}  # the gate knows the truth of the first set


def test_a_wrong_failing_or_missing_contestant_has_no_figures_and_stops_no_other():
    def returns(value):
        return lambda _: {"out": torch.tensor(value)}

    def raises(error):
        def step(_):
            raise error

        return step

    results = harness.measure(
        fake(
            {
                "right": returns(1.0),
                "wrong": returns(1.1),
                "nan": returns(float("nan")),
                "bug": raises(KeyError("here")),
                "large": raises(torch.OutOfMemoryError("of 80 GiB")),
                "lost": raises(ValueError("no triton backend exists")),
                "library": raises(ValueError("attention: no flash_attn is installed that takes this")),
                "kernel": raises(RuntimeError("No available kernel. Aborting execution.")),
                "floor": lambda _: None,
            }
        ),
        SETTING,
    )
    assert [name for name, result in results.items() if result.ran] == ["right", "floor"]
    assert "1e-01" in results["wrong"].failed or "0.1" in results["wrong"].failed
    assert results["nan"].failed and "KeyError: 'here'" in results["bug"].failed
    assert results["large"].absent == "out of memory" and "no triton backend" in results["lost"].absent
    assert "flash_attn" in results["library"].absent and "No available" in results["kernel"].absent
    assert all(len(result.times) == (2 if result.ran else 0) for result in results.values())


def test_a_contestant_that_fails_in_a_later_round_loses_its_figures():
    calls = iter(range(100))

    def fails_at_the_fifth(_):
        if next(calls) == 4:
            raise torch.OutOfMemoryError
        return {"out": torch.ones(())}

    results = harness.measure(fake({"a": fails_at_the_fifth, "b": lambda _: {"out": torch.ones(())}}), SETTING)
    assert results["a"].absent and not results["a"].times and len(results["b"].times) == 2


def test_a_sampled_floor_counts_as_often_as_it_stands_for(monkeypatch):
    monkeypatch.setattr(harness.Clock, "seconds", lambda self, function: (function(), 0.5)[1])
    results = harness.measure(
        fake({"a": lambda _: {"out": torch.ones(())}, "floor": lambda _: None}, floor_factor=8.0), SETTING
    )
    assert results["a"].times == [0.5, 0.5] and results["floor"].times == [4.0, 4.0]


def test_what_a_step_returns_is_not_extra_memory():
    def step(inputs):
        scratch = torch.ones(2**20, dtype=torch.uint8)
        out = torch.ones(2**18, dtype=torch.float32)
        return {"out": out[0], "view": out[1:], "more": scratch[:0].clone(), "view of an input": inputs.data[1:]}

    result = harness.measure(fake({"a": step}), SETTING)["a"]
    assert result.peak == 2**21 and result.extra == 2**20


# The programs


def call(*arguments, timeout=240):
    command = [sys.executable, *map(str, arguments)]
    # pytest-benchmark measures nothing where it finds itself below a process of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=BENCHMARKS.parent, env=environment
    )


def bench(*arguments):
    return call("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tiny", "--threads", 1, *arguments)


@pytest.mark.slow
def test_the_kernel_benchmarks_run_and_keep_every_figure(tmp_path):
    done = bench(
        *(BENCHMARKS / f"{file.__name__}.py" for file in FILES),
        "--figures",
        tmp_path / "figures.jsonl",
        f"--benchmark-json={tmp_path / 'benchmark.json'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "benchmark.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert {(row["operation"], row["case"], row["contestant"]) for row in rows} == {
        (case.operation, case.name, name) for case in CASES for name in case.contestants
    }
    assert [one["extra_info"] for one in kept["benchmarks"]] == rows
    for one, row in zip(kept["benchmarks"], rows, strict=True):
        assert one["stats"]["median"] * 1e3 == pytest.approx(row["ms"]["median"], rel=1e-6)
        assert one["group"] == f"{row['operation']} {row['case']}"
        assert row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert row["ratio_to_floor"]["median"] > 0 and row["speedup_over_public"]["median"] > 0
        assert row["tflops"] or row["gb_per_s"]
        assert row["contestant"] == "floor" or row["peak_mib"] > 0
        assert row["errors"] or row["contestant"] == "floor" or row["contestant"].startswith("full_")
    known = kept["machine_info"]["cocomix"]
    assert known["torch"] == torch.__version__ and known["commit"] and known["device"] and known["python"]
    assert "On a CPU: torch backend" in done.stdout and "target" in done.stdout
    assert all(summary.title(row) in done.stdout for row in rows)


@pytest.mark.slow
def test_the_folder_with_sweeps_measures_every_shape_once(tmp_path):
    out = tmp_path / "benchmark.json"
    done = bench(BENCHMARKS, "--sweep", f"--benchmark-json={out}", "-k", "topk_linear or interleaved_attention")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [one["extra_info"] for one in json.loads(out.read_text())["benchmarks"]]
    shapes = [json.dumps([row["operation"], row["contestant"], row["shape"]]) for row in rows]
    assert len(set(shapes)) == len(shapes)
    found = measurement_figures.sweeps(rows)
    assert set(found) == {"N", "d", "C", "k", "T"}
    assert all(len({row["shape"][key] for row in group}) >= 5 for key, groups in found.items() for group in groups)


@pytest.mark.slow
def test_a_benchmark_without_time_left_starts_no_case(tmp_path):
    done = bench(BENCHMARKS / "bench_attribution.py", "--budget", -1, "--figures", tmp_path / "figures.jsonl")
    assert done.returncode == 0 and "no time left" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert {row["absent"] for row in rows} == {"no time left"}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_the_public_way_compiles_and_passes_the_gate(file, monkeypatch):
    monkeypatch.setattr(harness.Setting, "compiles", lambda self, smallest: True)
    torch._dynamo.reset()
    case = next(case for case in file.cases(SETTING) if "compiled" in case.contestants)
    compiled = harness.measure(case, SETTING)["compiled"]
    assert compiled.ran, compiled.failed


@pytest.mark.slow
def test_flex_attention_has_the_mask_of_concept_queries():
    torch._dynamo.reset()
    case = bench_interleaved_attention.case(SETTING, "concept", False, 2, 16)
    inputs = case.inputs()
    without = SimpleNamespace(**{name: t.detach() for name, t in vars(inputs).items()})  # no backward pass on a CPU
    outputs = bench_interleaved_attention.flex(SETTING, trains=False)(without)
    assert all(error <= case.tolerance for error in case.errors(inputs, case.truth(inputs), outputs).values())


def test_the_tests_that_a_gpu_runs_are_those_of_every_operation():
    files = gpu.kernel_tests()
    folders = {folder.name for folder in (BENCHMARKS.parent / "kernels/cocomix_kernels").iterdir() if folder.is_dir()}
    tested = {Path(file).parent.name for file in files}
    assert tested == folders - {"__pycache__"} and all(Path(file).is_file() for file in files)


@pytest.mark.slow
def test_gpu_script_refuses_to_pass_off_a_cpu_as_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = call(BENCHMARKS / "gpu.py", "--out", tmp_path / "out.json")
    assert done.returncode == 2 and "no GPU here" in done.stdout and "--cpu" in done.stdout
    assert not (tmp_path / "out.json").exists()
    done = call(BENCHMARKS / "gpu.py", "--cpu", "--parts", "attributoin")
    assert done.returncode == 2 and "attribution" in done.stderr


@pytest.mark.slow
def test_gpu_script_writes_every_figure_of_a_part(tmp_path):
    out = tmp_path / "new" / "out.json"
    done = call(
        BENCHMARKS / "gpu.py", "--cpu", "--parts", "attribution", "--minutes", 2, "--out", out, "--commit", "abc"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["commit"] == "abc" and report["torch"] == torch.__version__ and not report["on_gpu"]
    assert {"device", "triton", "python", "time", "minutes", "seconds"} <= set(report)
    assert [(part["name"], part["status"]) for part in report["parts"]] == [("attribution", "passed")]
    assert {row["contestant"] for row in report["figures"]} == {"torch", "public", "floor"}
    assert list(out.parent.iterdir()) == [out]
    shown = call(BENCHMARKS / "gpu.py", "--show", out)
    assert shown.returncode == 0 and summary.title(report["figures"][0]) in shown.stdout


@pytest.mark.slow
def test_gpu_script_with_too_little_time_records_what_it_stopped_and_skipped(tmp_path):
    start = time.monotonic()
    done = call(BENCHMARKS / "gpu.py", "--cpu", "--minutes", 0.3, "--out", tmp_path / "out.json")
    assert time.monotonic() - start < 60
    report = json.loads((tmp_path / "out.json").read_text())
    status = {part["name"]: part["status"] for part in report["parts"]}
    assert list(status) == [part.name for part in gpu.PARTS]
    assert "skipped" in status.values() and "no time left" in done.stdout
    assert done.returncode == (1 if {"stopped", "failed"} & set(status.values()) else 0)
    assert all("output_tail" in part for part in report["parts"] if part["status"] in ("stopped", "failed"))


@pytest.mark.slow
def test_gpu_script_profiles_the_three_sizes(tmp_path):
    out = tmp_path / "out.json"
    done = call(BENCHMARKS / "gpu.py", "--cpu", "--profiles", "--minutes", 3, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert [(part["name"], part["status"]) for part in report["parts"]] == [
        (part.name, "passed") for part in gpu.PROFILES
    ]
    assert list(report["profiles"]) == ["69m", "386m", "1.38b"]
    for found in report["profiles"].values():
        assert set(found["methods"]) == {"ntp", "cached", "transformers", "public cached"}
    assert done.stdout.count("break-even saving") == 6  # a table's heading and a sentence for each
    assert "≥" not in done.stdout  # targets are for a GPU


def test_profiles_begin_with_what_may_fit_the_gpu():
    def windows(size, memory):
        (found,) = [text for text in gpu_profiles.command(size, Path("out.json"), memory) if "micro_batch" in text]
        return int(found.partition("=")[2])

    assert [windows(size, 85e9) for size in gpu_profiles.WINDOWS] == [32, 16, 4]
    assert windows("1.38b", 150e9) == 8
    assert {"--fit", "--random-teacher", "train.compile=true"} <= set(gpu_profiles.command("69m", Path("x"), 85e9))


def test_a_profiles_targets_are_those_of_its_size():
    def method(of, slower, memory, efficiency=None, windows=4):
        return replace(
            method_results("a method", 0.1),
            of=of,
            slower=slower and Spread.of([slower]),
            peak_memory_gib=memory,
            windows=windows,
            efficiency=efficiency,
        )

    methods = {
        "ntp": method(None, None, 10),
        "cached": method(None, None, 20, 0.91),
        "online": method(None, None, 21, 0.8),
        "transformers": method("ntp", 0.99, 12),
        "public cached": method("cached", 4.0, 40),
        "public online": method("online", 3.5, 30, windows=2),
    }
    found = replace(profile_results(), methods=methods)
    assert [met for _, _, met in gpu_profiles.targets("69m", found)] == [True, False, False, True, True]
    assert [met for _, _, met in gpu_profiles.targets("1.38b", found)] == [True, False, True, True, True]
    assert "efficiency with cached labels ≥ 0.9" in gpu_profiles.targets("386m", found)[0][0]


def test_time_that_a_part_leaves_goes_to_the_others():
    one, two, three = (gpu.Part(name, weight, ()) for name, weight in (("a", 1), ("b", 2), ("c", 1)))
    assert gpu.time_share([one, two, three], 100) == 25
    assert gpu.time_share([two, three], 90) == 60
    assert gpu.time_share([three], -3) == 0


def test_a_part_without_its_packages_or_without_time_is_skipped():
    missing = gpu.run_part(gpu.Part("attribution", 1, ("no_such_module",)), 100, False, 1, {})
    assert missing == {"name": "attribution", "status": "skipped", "reason": "needs no_such_module"}
    assert gpu.run_part(gpu.Part("attribution", 1, ()), 1, False, 1, {})["reason"] == "no time left"
    assert gpu.how_to_install(["pytest_benchmark", "torch"]) == "Install with: pip install pytest-benchmark torch"
    assert "-e ." in gpu.how_to_install(["cocomix"])


def is_running(pid: int) -> bool:
    """Whether a process is there and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_parts_pass_fail_or_are_stopped_with_everything_they_started(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    assert gpu.run([sys.executable, "-c", "print('fine')"], 30) == ("passed", "fine\n")
    status, output = gpu.run([sys.executable, "-c", "print('oh'); 1 / 0"], 30)
    assert status == "failed" and "ZeroDivisionError" in output
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    status, output = gpu.run([sys.executable, "-c", stubborn], 5)
    assert status == "stopped"
    deadline = time.monotonic() + 60
    while is_running(int(output)):
        assert time.monotonic() < deadline, "the child of a stopped part lives on"
        time.sleep(0.1)


def test_test_results_are_counted_and_failures_kept(tmp_path):
    (tmp_path / "junit.xml").write_text("""<testsuites><testsuite>
        <testcase classname="a" name="one"/>
        <testcase classname="a" name="two"><failure>assert 1 == 2</failure></testcase>
        <testcase classname="b" name="three"><skipped/></testcase>
        <testcase classname="b" name="four"><failure>x</failure><error>y</error></testcase>
        </testsuite></testsuites>""")
    found = gpu.test_results(tmp_path / "junit.xml")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["failures"][0] == {"test": "a::two", "message": "assert 1 == 2"}
    (tmp_path / "junit.xml").write_text("<testsuites><tests")
    assert gpu.test_results(tmp_path / "junit.xml")["passed"] == 0
