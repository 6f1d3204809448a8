"""The Triton building blocks for sparse products with rows of a matrix, against sums written out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, gpu_only, relative_error

from cocomix_kernels.common import sparse_rows as sparse

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What rounding to each dtype may cost; Triton's interpreter truncates float32 to bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def blank(*shape, dtype=torch.float32):
    """What an output holds before it is written."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def tokens(n, k, width, d, dtype=torch.float32, value_dtype=torch.float32, index_dtype=torch.int64):
    """values and indices [n, k], rows [n, d] and a matrix [width, d]."""
    values = torch.randn(n, k, device=DEVICE).to(value_dtype)
    indices = torch.randint(width, (n, k), device=DEVICE).to(index_dtype)
    rows, matrix = (torch.randn(size, d, device=DEVICE).to(dtype) for size in (n, width))
    return values, indices, rows, matrix


def scattered(values, indices, rows, width, base=None, base_sums=None, scale=1.0):
    """The sums of `scatter_rows` in float64, and those of the absolute values of their terms."""
    pairs = indices.flatten().long()
    weights = values.double().flatten()
    terms = (values.double()[:, :, None] * rows.double()[:, None, :]).flatten(0, 1)
    out, sums = (torch.zeros(width, *t.shape[1:], dtype=t.dtype, device=DEVICE) for t in (terms, weights))
    size = out.index_add(0, pairs, terms.abs())
    out, sums = out.index_add(0, pairs, terms), sums.index_add(0, pairs, weights)
    scale = float(scale)
    out, sums = (t if b is None else t + scale * b.double() for t, b in ((out, base), (sums, base_sums)))
    return out, sums, size


def assert_near(actual, expected, size=1.0):
    """`actual` is written in full and within its dtype's rounding, relative to a size, of `expected`."""
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs()
    assert (error <= TOLERANCE[actual.dtype] * (expected.abs() + size + 1)).all(), error.max()


@st.composite
def cases(draw):
    """Arguments of `tokens`, whether there is a base and a scale, and the dtype of what is written."""
    n, k = draw(st.integers(0, 4)), draw(st.sampled_from((1, 2, 7, 8, 9, 19)))
    width, d = draw(st.sampled_from((1, 2, 7))), draw(st.sampled_from((1, 3, 8, 130, 300)))
    dtypes = [draw(st.sampled_from(FLOATS)) for _ in range(2)]
    index_dtype = draw(st.sampled_from((torch.int64, torch.int32)))
    base = draw(st.sampled_from((None, *FLOATS)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    scale = torch.tensor(draw(st.sampled_from((-0.5, 0.0, 3.0))), device=DEVICE) if draw(st.booleans()) else None
    return tokens(n, k, width, d, *dtypes, index_dtype), base, scale, draw(st.sampled_from(FLOATS))


@given(cases())
@settings(max_examples=40)
def test_weighted_rows_are_the_base_and_the_sum_for_any_shape(case):
    (values, indices, rows, matrix), base, scale, dtype = case
    base = None if base is None else torch.randn(rows.shape, device=DEVICE).to(base)
    out = blank(*rows.shape, dtype=dtype)
    sparse.weighted_rows(values, indices, matrix, out, base, scale)
    terms = values.double()[:, :, None] * matrix.double()[indices.long()]
    expected = terms.sum(1)
    if base is not None:
        expected += base.double() * (1 if scale is None else scale.double())
    assert_near(out, expected, terms.abs().sum(1))


@given(cases(), st.sampled_from((2, 5, 128)), st.booleans())
@settings(max_examples=30)
def test_scattered_rows_are_the_base_and_the_sums_for_any_shape_and_length_of_pieces(case, piece, with_sums):
    (values, indices, rows, matrix), base, scale, dtype = case
    width, d = matrix.shape
    base, base_sums = (None if base is None else torch.randn(s, device=DEVICE).to(base) for s in ((width, d), (width,)))
    out, sums = blank(width, d, dtype=dtype), blank(width, dtype=dtype) if with_sums else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "PIECE", piece)
        plan = sparse.plan_by_concept(indices, width)
        sparse.scatter_rows(plan, values, rows, out, sums, base, base_sums, scale)
    expected, expected_sums, size = scattered(
        values, indices, rows, width, base, base_sums, 1 if scale is None else scale
    )
    assert_near(out, expected, size)
    if with_sums:
        assert_near(sums, expected_sums, values.double().abs().sum())


def pairs_per_concept(*counts):
    """indices [P, 1] in no order that hold concept c as often as the c-th count says."""
    concepts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return concepts[torch.randperm(len(concepts))][:, None].to(DEVICE)


@given(st.lists(st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 13)), min_size=1, max_size=6))
@settings(max_examples=40)
def test_pieces_that_end_anywhere_cover_each_pair_once(counts):
    indices = pairs_per_concept(*counts)
    values = torch.randint(1, 9, indices.shape, device=DEVICE).float()  # integers, so that sums are exact
    rows = torch.randint(-4, 5, (len(indices), 3), device=DEVICE).float()
    out, sums = blank(len(counts), 3), blank(len(counts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "PIECE", 4)
        sparse.scatter_rows(sparse.plan_by_concept(indices, len(counts)), values, rows, out, sums)
    expected, expected_sums, _ = scattered(values, indices, rows, len(counts))
    assert torch.equal(out.double(), expected)
    assert torch.equal(sums.double(), expected_sums)


def test_hot_concepts_of_real_piece_length_and_their_neighbours():
    counts = (0, 127, 128, 129, 1, 257, 0)
    indices = pairs_per_concept(*counts)
    values = torch.randint(1, 9, indices.shape, device=DEVICE).float()
    rows = torch.randint(-4, 5, (len(indices), 3), device=DEVICE).float()
    out, sums = blank(len(counts), 3), blank(len(counts))
    sparse.scatter_rows(sparse.plan_by_concept(indices, len(counts)), values, rows, out, sums)
    expected, expected_sums, _ = scattered(values, indices, rows, len(counts))
    assert torch.equal(out.double(), expected)
    assert torch.equal(sums.double(), expected_sums)


@pytest.mark.parametrize("counts", [(1,), (4,), (5, 0, 3), (9, 9), (3, 3, 3, 17), (40,)])
def test_partial_rows_stay_within_one_a_chunk(counts, monkeypatch):
    monkeypatch.setattr(sparse, "PIECE", 4)
    indices, buffers, empty = pairs_per_concept(*counts), [], torch.empty

    def guarded(shape, **options):  # a buffer with a row of NaN before and after what was asked for
        buffers.append(empty((shape[0] + 2, *shape[1:]), **options).fill_(torch.nan))
        return buffers[-1][1:-1]

    plan = sparse.plan_by_concept(indices, len(counts))
    out = blank(len(counts), 3)
    with monkeypatch.context() as patch:
        patch.setattr(sparse.torch, "empty", guarded)
        sparse.scatter_rows(plan, torch.ones(indices.shape, device=DEVICE), torch.ones(len(indices), 3).to(DEVICE), out)
    assert out[:, 0].tolist() == list(counts)
    assert len(buffers) == 2 and all(b[[0, -1]].isnan().all() for b in buffers)
    assert buffers[0].shape[0] - 2 == -(-sum(counts) // 4)


def test_a_plan_serves_several_scatters_and_keeps_equal_concepts_in_order():
    values, indices, rows, matrix = tokens(9, 5, 4, 6)
    plan = sparse.plan_by_concept(indices, 4)
    keys, order = torch.sort(indices.flatten(), stable=True)
    assert torch.equal(plan.order, order) and torch.equal(plan.tokens.long(), order // 5)
    assert torch.equal(plan.keys.long() - plan.first_key, keys)
    assert plan.starts.tolist() == [(keys < c).sum().item() for c in range(5)]
    for weights, source in ((values, rows), (2 * values, rows.half()), (values, rows[:, :2])):
        out = blank(4, source.shape[1])
        sparse.scatter_rows(plan, weights, source, out)
        assert_near(out, *scattered(weights, indices, source, 4)[::2])


@pytest.mark.parametrize("width", [2**15, 2**16, 2**16 + 1])
def test_a_plan_holds_the_last_concepts_of_wide_matrices(width):
    indices = torch.tensor([[2, width - 1], [width - 1, 5]], device=DEVICE)
    plan = sparse.plan_by_concept(indices, width)
    assert plan.n_concepts == width and (plan.keys.dtype == torch.int16) == (width <= 2**16)
    assert (plan.keys.long() - plan.first_key).tolist() == [2, 5, width - 1, width - 1]
    assert plan.tokens.tolist() == [0, 1, 0, 1]
    assert plan.starts[[0, 2, 3, 5, 6, width - 1, width]].tolist() == [0, 0, 1, 1, 2, 2, 4]


def test_a_scatter_reads_the_concepts_of_a_wide_plan():
    indices = pairs_per_concept(1, 0, 9, 2, 14)
    plan = sparse.plan_by_concept(indices, 2**16 + 1)
    plan = plan._replace(starts=plan.starts[:6])  # the others have no pairs, and the interpreter is slow
    values, rows, out = torch.randn(indices.shape, device=DEVICE), torch.randn(26, 3, device=DEVICE), blank(5, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "PIECE", 4)
        sparse.scatter_rows(plan, values, rows, out)
    assert_near(out, *scattered(values, indices, rows, 5)[::2])


def test_the_plan_for_a_total_adds_all_rows():
    values, _, rows, _ = tokens(19, 1, 1, 5)
    out = blank(1, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "PIECE", 4)
        sparse.scatter_rows(sparse.plan_for_total(19, rows.device), values, rows, out)
    assert_near(out, (values.double() * rows).sum(0, keepdim=True), (values * rows).abs().sum(0).double())


def test_rows_far_apart_are_read_in_place():
    values, indices, doubled, matrix = tokens(12, 3, 5, 10)
    odd = doubled.view(6, 2, 10)[:, 1]
    assert sparse.with_contiguous_rows(odd).data_ptr() == odd.data_ptr()
    values, indices = values[:6], indices[:6]
    out, expected = blank(5, 10), blank(5, 10)
    plan = sparse.plan_by_concept(indices, 5)
    sparse.scatter_rows(plan, values, odd, out)
    sparse.scatter_rows(plan, values, odd.contiguous(), expected)
    assert torch.equal(out, expected)
    base, total, expected_total = torch.randn(6, 2, 10, device=DEVICE)[:, 1], blank(6, 10), blank(6, 10)
    sparse.weighted_rows(values, indices, matrix, total, base)
    sparse.weighted_rows(values, indices, matrix, expected_total, base.contiguous())
    assert torch.equal(total, expected_total)


def test_rows_that_are_not_contiguous_at_all_are_copied():
    values, indices, _, _ = tokens(6, 3, 5, 10)
    rows, matrix = torch.randn(10, 6, device=DEVICE).t(), torch.randn(10, 5, device=DEVICE).t()
    out, total = blank(5, 10), blank(6, 10)
    sparse.scatter_rows(sparse.plan_by_concept(indices, 5), values.t().contiguous().t(), rows, out)
    sparse.weighted_rows(values, indices, matrix, total, rows)
    picked = matrix.double()[indices]
    assert_near(out, *scattered(values, indices, rows, 5)[::2])
    assert_near(total, rows.double() + (values.double()[:, :, None] * picked).sum(1), 20)


def test_an_output_may_be_its_base():
    values, indices, rows, matrix = tokens(6, 4, 3, 10)
    scale = torch.tensor(0.25, device=DEVICE)
    dx, dw, db = rows.clone(), matrix.clone(), torch.randn(3, device=DEVICE)
    expected_dx, expected_dw, expected_db = blank(6, 10), blank(3, 10), blank(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "PIECE", 4)  # concepts of one piece and of several
        plan = sparse.plan_by_concept(indices, 3)
        sparse.weighted_rows(values, indices, matrix, expected_dx, dx, scale)
        sparse.scatter_rows(plan, values, rows, expected_dw, expected_db, dw, db, scale)
        sparse.weighted_rows(values, indices, matrix, dx, dx, scale)
        sparse.scatter_rows(plan, values, rows, dw, db, dw, db, scale)
    assert torch.equal(dx, expected_dx) and torch.equal(dw, expected_dw) and torch.equal(db, expected_db)


def test_only_kept_rows_are_read():
    values, indices, rows, matrix = tokens(4, 3, 6, 10)
    indices[:] = torch.tensor([1, 4, 5])
    matrix[[0, 2, 3]] = torch.nan
    total = blank(4, 10)
    sparse.weighted_rows(values, indices, matrix, total)
    assert total.isfinite().all()


def test_nothing_waits_for_the_device(monkeypatch):
    values, indices, rows, matrix = tokens(6, 4, 3, 10)
    scale, out, sums, total = torch.tensor(2.0, device=DEVICE), blank(3, 10), blank(3), blank(6, 10)

    def refuse(*_):
        raise AssertionError("a number was asked of the device")

    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    else:  # the interpreter itself reads numbers, so only what surrounds the kernels is watched
        monkeypatch.setattr(sparse, "launch", lambda *_, **__: None)
        for name in ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
    try:
        sparse.weighted_rows(values, indices, matrix, total, rows, scale)
        sparse.scatter_rows(sparse.plan_by_concept(indices, 3), values, rows, out, sums, matrix, matrix[:, 0], scale)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize("d", [512, 1024, 2048])
def test_paper_shapes_are_deterministic_and_right_with_a_concept_that_every_token_keeps(d):
    values, indices, rows, matrix = tokens(65536, 32, 32768, d, torch.bfloat16)
    indices[:, 7] = 3
    out, again = (blank(32768, d, dtype=torch.bfloat16) for _ in range(2))
    plan = sparse.plan_by_concept(indices, 32768)
    sparse.scatter_rows(plan, values, rows, out)
    sparse.scatter_rows(sparse.plan_by_concept(indices, 32768), values, rows, again)
    assert torch.equal(out, again)
    exact = torch.zeros(32768, d, dtype=torch.float64, device=DEVICE)
    for part in range(0, 65536, 1024):
        chunk = slice(part, part + 1024)
        terms = values[chunk, :, None].double() * rows[chunk, None].double()
        exact.index_add_(0, indices[chunk].flatten(), terms.flatten(0, 1))
    assert relative_error(out, exact) <= 1.5 * relative_error(exact.bfloat16(), exact)
    assert relative_error(out[3], exact[3]) <= 1.5 * relative_error(exact[3].bfloat16(), exact[3])
