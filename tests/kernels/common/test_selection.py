"""The TopK of `cocomix_kernels.common.selection` is a stable descending sort, cut off at k."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import WIDTHS

from cocomix_kernels.common.selection import stable_topk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (-torch.inf, torch.inf, torch.nan, -torch.nan, 0.0, -0.0)


def assert_is_a_stable_sort(logits, k):
    values, indices = stable_topk(logits, k)
    expected, order = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(indices, order[:, :k])
    torch.testing.assert_close(values, expected[:, :k], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit(), logits.gather(1, order[:, :k]).signbit())


@st.composite
def tied_logits(draw):
    rows, width = draw(st.integers(0, 3)), draw(st.sampled_from((*WIDTHS, 127, 128, 640)))
    k = draw(st.one_of(st.just(1), st.just(width), st.integers(1, min(width, 40))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from((0, 1, 3, 1000)))
    logits = torch.randint(-spread, spread + 1, (rows, width), generator=generator) * draw(st.sampled_from((1.0, 0.1)))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        logits[torch.rand(rows, width, generator=generator) < draw(st.sampled_from((0.01, 0.5, 0.99)))] = value
    return logits.to(draw(st.sampled_from(DTYPES))), k


@given(tied_logits())
def test_equals_a_stable_sort_with_ties_infinities_nan_and_signed_zeros(case):
    assert_is_a_stable_sort(*case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "k"), [(5000, 1), (5000, 5), (5000, 20), (5000, 39), (5000, 40), (32768, 32)])
def test_equals_a_stable_sort_on_normal_logits(width, k, dtype):
    assert_is_a_stable_sort(torch.randn(16, width).to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.0, torch.inf, -torch.inf, torch.nan])
def test_equal_logits_give_the_lowest_indices(value, dtype):
    _, indices = stable_topk(torch.full((2, 4097), value, dtype=dtype), 7)
    assert torch.equal(indices, torch.arange(7).expand(2, 7))


def test_all_kept_are_neighbours_or_all_are_far_apart():
    width, k = 2563, 8
    together, apart = torch.zeros(1, width), torch.zeros(1, width)
    places = 320 + torch.arange(k), 63 + 300 * torch.arange(k)
    for logits, columns in zip((together, apart), places, strict=True):
        logits[0, columns] = 1 + torch.arange(k, dtype=torch.float32)
        assert torch.equal(stable_topk(logits, k)[1], columns.flip(0)[None])


@pytest.mark.parametrize("k", [1, 4, 30, 200])
@pytest.mark.parametrize("ragged", [0, 1, 2, 3, 7, 15, 31, 63])
def test_the_columns_of_a_ragged_last_group_are_taken_once(ragged, k):
    logits = torch.full((1, 2560 + ragged), -torch.inf)
    logits[0, -1] = 1.0
    values, indices = stable_topk(logits, k)
    assert indices.tolist() == [[2559 + ragged, *range(k - 1)]]
    assert values[0, 0] == 1 and values[0, 1:].eq(-torch.inf).all()


def test_neighbouring_floats_are_told_apart():
    one = torch.tensor(1.0)
    logits = torch.zeros(1, 4097)
    logits[0, [9, 4000]] = torch.stack([one, torch.nextafter(one, 2 * one)])
    logits[0, [7, 100]] = torch.stack([torch.tensor(1e-45), torch.tensor(-1e-45)])
    values, indices = stable_topk(logits, 4)
    assert indices.tolist() == [[4000, 9, 7, 0]]
    assert_is_a_stable_sort(-logits, 4)
