"""Products into buffers of another precision, in blocks on a CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import DEVICE

from cocomix_kernels.common import products
from cocomix_kernels.common.products import add_product_, scaled, write_product


def small_integers(*shape, dtype):
    """Whose products and sums every dtype holds exactly."""
    return torch.randint(-2, 3, shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@given(shape=st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 9)), seed=st.integers(0, 2**32))
def test_products_are_those_of_whole_matrices_however_many_blocks(block, wide, shape, seed):
    torch.manual_seed(seed)
    rows, inner, columns = shape
    left = small_integers(inner, rows, dtype=torch.bfloat16).t()
    right = small_integers(columns, inner, dtype=torch.bfloat16).t()
    total = small_integers(rows, columns, dtype=wide)
    expected = total.double() + left.double() @ right.double()
    out = torch.empty_like(total)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_BLOCK_ELEMENTS", block)
        add_product_(total, left, right)
        write_product(out, left, right)
    assert torch.equal(total.double(), expected)
    assert torch.equal(out.double(), left.double() @ right.double())


def test_sums_over_products_keep_what_a_low_precision_would_lose():
    total = torch.full((3, 4), 1024.0, device=DEVICE)
    one = torch.ones(3, 1, dtype=torch.bfloat16, device=DEVICE)
    add_product_(total, one, torch.ones(1, 4, dtype=torch.bfloat16, device=DEVICE))
    assert torch.equal(total, torch.full_like(total, 1025.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (1, 1), (9, 4)])
def test_a_matrix_is_scaled_before_it_is_rounded(dtype, shape, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 8)
    matrix, factor = torch.randn(shape, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    assert torch.equal(scaled(matrix, factor, dtype), (matrix * factor).to(dtype))
