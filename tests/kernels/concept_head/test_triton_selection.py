"""`row_topk` is a stable descending sort cut off at k, with the log-sum-exp and the losses of the same logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, WIDTHS, gpu_only

from cocomix_kernels.concept_head.triton_selection import row_topk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (-torch.inf, torch.inf, 0.0, -0.0)


def select(logits, k, labels=None, label_weights=None):
    """values, indices, lse and losses (None without labels), in buffers that hold NaN and nonsense before."""
    n = len(logits)
    values = torch.full((n, k), torch.nan, device=DEVICE)
    indices = torch.full((n, k), -7, device=DEVICE)
    if labels is None:
        row_topk(logits, k, values, indices)
        return values, indices, None, None
    lse, losses = (torch.full((n,), torch.nan, device=DEVICE) for _ in range(2))
    row_topk(logits, k, values, indices, labels=labels, label_weights=label_weights, lse=lse, losses=losses)
    return values, indices, lse, losses


def assert_is_a_stable_sort(logits, k):
    values, indices, *_ = select(logits, k)
    expected, order = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(indices, order[:, :k])
    assert torch.equal(values, expected[:, :k].float())


@st.composite
def tied_logits(draw):
    rows, width = draw(st.integers(0, 3)), draw(st.sampled_from((*WIDTHS, 128, 640)))
    k = draw(st.one_of(st.just(1), st.integers(1, min(width, 40))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from((0, 1, 3, 1000)))
    logits = torch.randint(-spread, spread + 1, (rows, width), generator=generator) * draw(st.sampled_from((1.0, 0.1)))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        logits[torch.rand(rows, width, generator=generator) < draw(st.sampled_from((0.01, 0.5, 0.99)))] = value
    return logits.to(DEVICE, draw(st.sampled_from(DTYPES))), k


@given(tied_logits())
@settings(max_examples=25)
def test_equals_a_stable_sort_with_ties_infinities_and_signed_zeros(case):
    assert_is_a_stable_sort(*case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "k"), [(5000, 7), (300, 256), (5000, 64), (32768, 32)])
def test_equals_a_stable_sort_on_normal_logits(width, k, dtype):
    assert_is_a_stable_sort(torch.randn(2, width).to(DEVICE, dtype), k)


@pytest.mark.parametrize("width", [65536, 65537, 2**17])
def test_indices_beyond_sixteen_bits_are_right(width):
    logits = torch.randn(2, width).to(DEVICE, torch.bfloat16)
    logits[:, -1] = 9
    assert_is_a_stable_sort(logits, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.0, torch.inf, -torch.inf])
def test_equal_logits_give_the_lowest_indices(value, dtype):
    values, indices, *_ = select(torch.full((2, 4097), value, dtype=dtype, device=DEVICE), 7)
    assert torch.equal(indices.cpu(), torch.arange(7).expand(2, 7))
    assert values.eq(value).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_comes_first_without_statistics(dtype, sign):
    logits = torch.randn(3, 700).to(DEVICE, dtype)
    logits[1, 431] = sign * torch.nan
    values, indices, *_ = select(logits, 4)
    assert indices[1, 0] == 431 and values[1, 0].isnan() and values[1, 1:].isfinite().all()
    assert values[[0, 2]].isfinite().all()


def test_neighbouring_floats_are_told_apart():
    one = torch.tensor(1.0)
    logits = torch.zeros(1, 4097)
    logits[0, [9, 4000]] = torch.stack([one, torch.nextafter(one, 2 * one)])
    assert select(logits.to(DEVICE), 3)[1].tolist() == [[4000, 9, 0]]
    assert_is_a_stable_sort(-logits.to(DEVICE), 4)


def some_targets(n, width, n_labels):
    labels = torch.randint(width, (n, n_labels), device=DEVICE, dtype=torch.int32)
    weights = torch.rand(n, n_labels, device=DEVICE)
    missing = torch.rand(n, n_labels, device=DEVICE) < 0.3
    return labels.masked_fill(missing, -1), weights.masked_fill(missing, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_labels", [0, 1, 3])
@pytest.mark.parametrize("width", [5, 3000])
def test_statistics_are_those_of_the_stored_logits(width, n_labels, dtype):
    logits = (20 * torch.randn(4, width)).to(DEVICE, dtype)
    labels, weights = some_targets(4, width, n_labels)
    values, indices, lse, losses = select(logits, 4, labels, weights)
    exact = logits.double().logsumexp(1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)
    of_labels = exact[:, None] - logits.double().gather(1, labels.long().clamp(min=0))
    torch.testing.assert_close(losses.double(), (weights * of_labels).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, torch.sort(logits, dim=1, descending=True, stable=True)[1][:, :4])
    assert values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_rows_with_infinities_and_nan(dtype):
    logits = torch.full((5, 5000), -torch.inf, dtype=dtype, device=DEVICE)
    logits[1, 4321] = 3.0
    logits[2] = 2e38  # whose sum overflows
    logits[3, 17] = torch.nan
    logits[4, 4999] = torch.inf
    labels = torch.tensor([[4321]] * 5, dtype=torch.int32, device=DEVICE)
    _, _, lse, losses = select(logits, 2, labels, torch.ones(5, 1, device=DEVICE))
    torch.testing.assert_close(lse[:3].cpu(), torch.tensor([-torch.inf, 3.0, logits[2, 0].item()]))
    assert lse[3:].isnan().all() and losses[3:].isnan().all()
    assert losses[0].isnan() and losses[1] == 0 and losses[2].isfinite()


def test_a_label_of_weight_zero_adds_nothing_whatever_its_logit():
    logits = torch.randn(1, 50, device=DEVICE)
    logits[0, 7] = -torch.inf
    labels = torch.tensor([[7, 3]], dtype=torch.int32, device=DEVICE)
    _, _, lse, losses = select(logits, 2, labels, torch.tensor([[0.0, 2.0]], device=DEVICE))
    torch.testing.assert_close(losses, 2 * (lse - logits[:, 3]))


@gpu_only
@pytest.mark.parametrize("k", [1, 32, 64, 128, 256])
@pytest.mark.parametrize("width", [16384, 32768, 65536, 131072])
def test_wide_rows_on_the_gpu_equal_a_stable_sort(width, k):
    assert_is_a_stable_sort(torch.randn(512, width, device=DEVICE).bfloat16(), k)
