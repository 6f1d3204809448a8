"""`concept_attribution`'s Triton backend against the reference and the torch backend."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, gpu_only

from cocomix_kernels import concept_attribution, reference

attribution = partial(concept_attribution, backend="triton")


def latents(n=5, k=6, width=40, d=5, dtype=torch.float32):
    """values, indices, grad and decoder, the values non-negative as after ReLU and the indices in no order."""
    indices = torch.rand(n, width, device=DEVICE).argsort(1)[:, :k]
    values, grad, decoder = (torch.randn(s, device=DEVICE).to(dtype) for s in ((n, k), (n, d), (width, d)))
    return values.relu(), indices, grad, decoder


@pytest.mark.parametrize("label_topk", [1, 3, 6, 7, 8, 9, 40, 50])
def test_labels_equal_those_of_the_dense_attribution(label_topk):
    arguments = latents()
    labels = attribution(*arguments, label_topk)
    assert labels.dtype == torch.int64 and labels.shape == (5, label_topk)
    assert torch.equal(labels, reference.concept_attribution(*arguments, label_topk))


@st.composite
def integer_latents(draw):
    n, d, width = draw(st.integers(0, 3)), draw(st.sampled_from((1, 3, 130, 300))), draw(st.sampled_from((1, 7, 65)))
    k = draw(st.one_of(st.integers(1, width), st.just(width)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    largest, dtypes = draw(st.integers(0, 2)), st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
    values, grad, decoder = (
        torch.randint(-largest, largest + 1, shape, generator=generator).to(DEVICE, draw(dtypes))
        for shape in ((n, k), (n, d), (width, d))
    )
    indices = torch.rand(n, width, generator=generator).argsort(1)[:, :k].to(DEVICE)
    return values, indices.to(draw(st.sampled_from((torch.int64, torch.int32, torch.uint8)))), grad, decoder


@given(integer_latents(), st.integers(1, 70))
@settings(max_examples=40)
def test_any_shape_with_ties_and_zeros_and_any_mixture_of_dtypes(case, label_topk):
    values, indices, grad, decoder = case
    expected = reference.concept_attribution(values.double(), indices.long(), grad, decoder, label_topk)
    assert torch.equal(attribution(*case, label_topk), expected)


@pytest.mark.parametrize("k", [1, 5, 20, 32, 100, 512])
def test_labels_come_in_order_of_their_attribution_for_any_number_of_latents(k):
    values, indices, grad, decoder = latents(2, k, 600, 16)
    labels = attribution(values, indices, grad, decoder, k)
    scores = values.double() * (decoder[indices].double() * grad[:, None].double()).sum(2)
    for row in range(2):
        by_concept = dict(zip(indices[row].tolist(), scores[row].tolist(), strict=True))
        kept = [by_concept[label] for label in labels[row].tolist() if label >= 0]
        torch.testing.assert_close(kept, sorted((s for s in by_concept.values() if s > 0), reverse=True))


def test_only_strictly_positive_attributions_count_and_ties_go_to_the_lowest_index():
    decoder = torch.tensor([[1.0], [-1.0], [0.0], [2.0], [1.0], [2.0]], device=DEVICE)
    indices = torch.tensor([[5, 4, 2, 1, 3, 0]], device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    assert attribution(one.expand(1, 6), indices, one, decoder, 6).tolist() == [[3, 5, 0, 4, -1, -1]]
    assert attribution(one.expand(1, 6), indices, one * 0, decoder, 6).eq(-1).all()


def test_infinite_and_missing_attributions_are_treated_as_by_the_torch_backend():
    values = torch.tensor([[1.0, torch.inf, torch.nan, -torch.inf, 3.0], [torch.nan] * 5], device=DEVICE)
    indices = torch.tensor([[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]], device=DEVICE)
    arguments = values, indices, torch.ones(2, 1, device=DEVICE), torch.ones(5, 1, device=DEVICE)
    expected = concept_attribution(*arguments, 5, backend="torch")
    assert expected.tolist() == [[-1, 3, 0, 4, -1], [-1] * 5]
    assert torch.equal(attribution(*arguments, 5), expected)


def test_decoder_rows_that_are_not_active_do_not_matter():
    values, indices, grad, decoder = latents(4, 3, 6)
    indices[:] = torch.tensor([1, 4, 5])
    expected = reference.concept_attribution(values, indices, grad, decoder, 3)
    decoder[[0, 2, 3]] = torch.nan
    assert torch.equal(attribution(values, indices, grad, decoder, 3), expected)


def test_low_precision_products_accumulate_in_float32():
    values, indices, grad, decoder = latents(8, 8, 30, 300, torch.bfloat16)
    exact = reference.concept_attribution(values.double(), indices, grad.double(), decoder.double(), 4)
    assert torch.equal(attribution(values, indices, grad, decoder, 4), exact)
    assert torch.equal(attribution(values.float(), indices, grad.float(), decoder, 4), exact)


def test_inputs_need_not_be_contiguous_and_stay_as_they_were():
    arguments = latents()
    expected = attribution(*arguments, 4)
    strided = [t.t().contiguous().t() for t in arguments]
    strided[2] = torch.stack([arguments[2]] * 2, dim=1)[:, 1]  # rows apart, as in a doubled sequence
    kept = [t.clone() for t in strided]
    assert torch.equal(attribution(*strided, 4), expected)
    assert all(map(torch.equal, strided, kept))


def test_it_records_no_gradient():
    values, indices, grad, decoder = latents()
    assert not attribution(values, indices, grad, decoder.requires_grad_(), 4).requires_grad


@pytest.mark.parametrize(
    "arguments", [latents(dtype=torch.float64), latents(k=513, width=520)], ids=["float64", "513 latents"]
)
def test_what_triton_does_not_take_is_refused_on_demand_and_left_to_torch_otherwise(arguments, monkeypatch):
    with pytest.raises(ValueError, match="concept_attribution: no triton backend exists"):
        attribution(*arguments, 4)
    monkeypatch.setenv("COCOMIX_BACKEND", "triton")
    expected = concept_attribution(*arguments, 4, backend="torch")
    assert torch.equal(concept_attribution(*arguments, 4), expected)


def test_compiles_into_one_graph():
    compiled = torch.compile(attribution, fullgraph=True, backend="aot_eager")
    for n in (5, 8):
        arguments = latents(n)
        assert torch.equal(compiled(*arguments, 4), attribution(*arguments, 4))


def test_is_registered_as_pytorch_expects_an_operator():
    torch.library.opcheck(torch.ops.cocomix.concept_attribution.default, (*latents(3), 4))


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paper_shapes_agree_with_the_torch_backend(dtype):
    values, indices, grad, decoder = latents(1, 32, 32768, 768, dtype)
    values, grad = (torch.randn(65536, w, device=DEVICE).to(dtype) for w in (32, 768))
    indices = torch.randint(1024, (65536, 32), device=DEVICE) + torch.arange(0, 32768, 1024, device=DEVICE)
    labels = attribution(values.relu(), indices, grad, decoder, 4)
    expected = concept_attribution(values.relu(), indices, grad, decoder, 4, backend="torch")
    assert (labels == expected).float().mean() > 0.999
