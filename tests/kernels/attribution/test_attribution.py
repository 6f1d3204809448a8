"""`concept_attribution` against its reference, the paper's public code, and its own promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import set_chunk_bytes, trace

from cocomix_kernels import concept_attribution, reference

GOLDEN = Path(__file__).parents[2] / "fixtures"


def latents(n=9, k=6, width=40, d=5, dtype=torch.float64):
    """values, indices, grad and decoder, the values non-negative as after ReLU and the indices in no order."""
    indices = torch.rand(n, width).argsort(1)[:, :k]
    return torch.randn(n, k).relu().to(dtype), indices, torch.randn(n, d).to(dtype), torch.randn(width, d).to(dtype)


@pytest.mark.parametrize("label_topk", [1, 3, 6, 7, 39, 40, 50])
def test_labels_equal_those_of_the_dense_attribution(label_topk):
    arguments = latents()
    labels = concept_attribution(*arguments, label_topk)
    assert labels.dtype == torch.int64 and labels.shape == (9, label_topk)
    assert torch.equal(labels, reference.concept_attribution(*arguments, label_topk))


@st.composite
def integer_latents(draw):
    n, d, width = draw(st.integers(0, 4)), draw(st.integers(1, 4)), draw(st.sampled_from((1, 7, 64, 65, 300)))
    k = draw(st.integers(1, min(width, 20)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    largest = draw(st.integers(0, 2))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
    values, grad, decoder = (
        torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)
        for shape in ((n, k), (n, d), (width, d))
    )
    indices = torch.rand(n, width, generator=generator).argsort(1)[:, :k]
    return values, indices.to(draw(st.sampled_from((torch.int64, torch.int32)))), grad, decoder


@given(integer_latents(), st.integers(1, 30))
@settings(max_examples=80)
def test_any_shape_with_ties_and_zeros(case, label_topk):
    values, indices, grad, decoder = case
    expected = reference.concept_attribution(values, indices.long(), grad, decoder, label_topk)
    assert torch.equal(concept_attribution(*case, label_topk), expected)


def test_labels_are_the_golden_ones_of_the_public_code():
    golden = np.load(GOLDEN / "attribution_golden.npz")
    attribution = torch.from_numpy(golden["attribution"]).flatten(0, 1)  # [N, C]
    active = torch.from_numpy(golden["latents"]).flatten(0, 1)
    n, width = active.shape
    k = int((active > 0).sum(1).max())
    values, indices = active.topk(k, dim=1)
    expected = torch.from_numpy(golden["labels"]).flatten(0, 1)
    decided = (attribution > 0).sum(1) >= expected.shape[1]  # elsewhere its picks are arbitrary
    assert decided.any() and not decided.all()
    for row in range(n):  # with the identity as decoder the gradient is the attribution over the latent
        gradient = torch.where(active[row] > 0, attribution[row] / active[row], 0)
        labels = concept_attribution(
            values[row : row + 1], indices[row : row + 1], gradient[None], torch.eye(width), expected.shape[1]
        )[0]
        if decided[row]:
            assert labels.sort().values.tolist() == expected[row].sort().values.tolist()
        assert (labels >= 0).sum() == min((attribution[row] > 0).sum(), expected.shape[1])


def test_without_a_gradient_there_are_no_labels():
    values, indices, grad, decoder = latents()
    assert concept_attribution(values, indices, grad * 0, decoder, 4).eq(-1).all()
    assert concept_attribution(values * 0, indices, grad, decoder, 4).eq(-1).all()


def test_only_strictly_positive_attributions_count_and_ties_go_to_the_lowest_index():
    decoder = torch.tensor([[1.0], [-1.0], [0.0], [2.0], [1.0], [2.0]])
    indices = torch.tensor([[5, 4, 2, 1, 3, 0]])
    labels = concept_attribution(torch.ones(1, 6), indices, torch.ones(1, 1), decoder, 6)
    assert labels.tolist() == [[3, 5, 0, 4, -1, -1]]


def test_low_precision_products_accumulate_in_float32():
    values, indices, grad, decoder = latents(64, 8, 300, 256, torch.bfloat16)
    exact = reference.concept_attribution(values.double(), indices, grad.double(), decoder.double(), 4)
    assert (concept_attribution(values, indices, grad, decoder, 4) == exact).float().mean() > 0.99
    mixed = concept_attribution(values.float(), indices, grad.float(), decoder, 4)
    assert (mixed == exact).float().mean() > 0.99


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 9000])  # one row, and a number that leaves a ragged last chunk
def test_chunks_do_not_change_the_labels(chunk_bytes, monkeypatch):
    arguments = latents()
    whole = concept_attribution(*arguments, 4)
    set_chunk_bytes(monkeypatch, chunk_bytes)
    assert torch.equal(concept_attribution(*arguments, 4), whole)


def test_it_samples_dot_products_and_records_no_gradient():
    values, indices, grad, decoder = latents(32, 6, 2000, 16, torch.float32)
    decoder.requires_grad_()
    products, _, largest = trace(lambda: concept_attribution(values, indices, grad, decoder, 4))
    assert sum(products.values()) <= 32 * 6 * 16
    assert largest < 32 * 2000


def test_inputs_stay_as_they_were():
    arguments = latents()
    kept = [t.clone() for t in arguments]
    concept_attribution(*arguments, 4)
    assert all(map(torch.equal, arguments, kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(indices=torch.zeros(4, 3).long()), r"indices has shape \[4, 3\], expected \[N, k\] with N=4, k=2"),
        (dict(grad=torch.randn(5, 3)), r"grad has shape \[5, 3\], expected \[N, d\] with N=4"),
        (dict(decoder=torch.randn(9, 4)), r"decoder has shape \[9, 4\], expected \[C, d\] with .*d=3"),
        (dict(indices=torch.zeros(4, 2)), "indices has dtype torch.float32, expected "),
        (dict(values=torch.zeros(4, 2).long()), "values has dtype torch.int64, expected a floating-point dtype"),
        (dict(grad=torch.zeros(4, 3).long()), "grad has dtype torch.int64, expected a floating-point dtype"),
        (dict(decoder=torch.randn(9, 3, device="meta")), "decoder is on meta but values is on cpu"),
        (dict(indices=torch.full((4, 2), 9)), "indices holds values from 9 to 9, expected 0 to 8"),
        (dict(indices=torch.full((4, 2), -1)), "indices holds values from -1 to -1, expected 0 to 8"),
        (dict(label_topk=0), "label_topk is 0, expected 1 to "),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    fitting = dict(values=torch.rand(4, 2), indices=torch.zeros(4, 2).long(), grad=torch.randn(4, 3))
    with pytest.raises(ValueError, match="concept_attribution: " + message):
        concept_attribution(**(fitting | dict(decoder=torch.randn(9, 3), label_topk=2) | change))
