"""`concept_mix`, `concept_add` and `concept_vectors` against the reference: outputs, every gradient, precision."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_all_close, assert_no_worse_than, cast, leaves, run, set_chunk_bytes, trace

from cocomix_kernels import concept_add, concept_mix, concept_vectors, reference

NAMES = ("hidden", "values", "indices", "weight", "bias", "pre_bias", "mean", "std")
FLOATING = (0, 1, 3, 4, 5, 6, 7)


def arguments(batch=2, length=5, d=6, width=30, k=4, dtype=torch.float64, wide=None):
    """Arguments in the order of `NAMES`; values, mean and std have the dtype `wide`, and indices have no order."""
    wide = wide or dtype
    return [
        torch.randn(batch, length, d, dtype=dtype),
        torch.randn(batch, length, k, dtype=wide),
        torch.rand(batch, length, width).argsort(2)[..., :k],
        torch.randn(width, d, dtype=dtype),
        torch.randn(d, dtype=dtype),
        torch.randn(d, dtype=dtype),
        torch.randn(batch, length, 1, dtype=wide),
        torch.rand(batch, length, 1, dtype=wide) + 0.5,
    ]


@given(
    st.integers(0, 3),
    st.sampled_from((1, 2, 7)),
    st.integers(1, 6),
    st.sampled_from((1, 7, 64, 65)),
    st.booleans(),
    st.data(),
    st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_outputs_and_gradients_equal_the_reference_for_any_shape(batch, length, d, width, residual, data, seed):
    torch.manual_seed(seed)
    k = data.draw(st.one_of(st.just(1), st.just(width), st.integers(1, width)), label="k")
    inputs = arguments(batch, length, d, width, k)
    grads = [torch.randn(batch, 2 * length, d, dtype=torch.float64)]
    actual, expected = (
        run(partial(function, residual=residual), inputs, grads) for function in (concept_mix, reference.concept_mix)
    )
    assert_all_close(actual[0], expected[0])
    assert_all_close(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_make_an_empty_mix(shape, dtype):
    inputs = leaves(arguments(*shape, dtype=dtype, wide=torch.float32))
    mixed = concept_mix(*inputs)
    assert mixed.shape == (shape[0], 2 * shape[1], 6)
    mixed.sum().backward()
    assert not inputs[3].grad.any()


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_of_every_input_pass_gradcheck(residual):
    inputs = leaves(arguments(2, 2, 3, 7, 3))
    assert torch.autograd.gradcheck(partial(concept_mix, residual=residual), inputs)


def test_the_residual_form_is_hidden_and_concept_without_the_mean():
    inputs = arguments()
    mixed, concepts = concept_mix(*inputs, residual=True), concept_vectors(*inputs[1:])
    assert torch.equal(mixed[:, 0::2], inputs[0])
    assert_all_close([mixed[:, 1::2]], [inputs[0] + concepts - inputs[6]])


def test_even_rows_are_the_hidden_states_and_odd_rows_the_concepts():
    inputs = arguments()
    mixed, concepts = concept_mix(*inputs), concept_vectors(*inputs[1:])
    assert torch.equal(mixed[:, 0::2], inputs[0])
    assert torch.equal(mixed[:, 1::2], concepts)
    assert_all_close([mixed], [reference.concept_mix(*inputs)])


@pytest.mark.parametrize("shape", [(2, 5, 6, 30, 4), (1, 1, 1, 1, 1), (2, 3, 4, 7, 7), (0, 3, 4, 7, 2)])
def test_adding_equals_the_reference_with_every_gradient(shape):
    inputs = arguments(*shape)
    grads = [torch.randn_like(inputs[0])]
    actual, expected = run(concept_add, inputs, grads), run(reference.concept_add, inputs, grads)
    assert_all_close(actual[0], expected[0])
    assert_all_close(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_is_hidden_and_concept_in_hiddens_dtype(dtype):
    inputs = arguments(dtype=dtype, wide=torch.float32)
    added = concept_add(*inputs)
    assert added.dtype == dtype and added.shape == inputs[0].shape
    assert torch.equal(added, inputs[0] + concept_vectors(*inputs[1:]).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_every_input_keeps_its_dtype_and_so_does_its_gradient(dtype, wide):
    inputs = arguments(dtype=dtype, wide=wide)
    (mixed,), gradients = run(concept_mix, inputs)
    assert mixed.dtype == dtype
    assert all(g is None or g.dtype == t.dtype for t, g in zip(inputs, gradients, strict=True))
    exact = reference.concept_mix(*cast(inputs, torch.float64))
    tolerance = 3e-2 if torch.bfloat16 in (dtype, wide) else 1e-4
    torch.testing.assert_close(mixed, exact, check_dtype=False, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_exact_as_pytorch_and_sums_in_float32(dtype, residual):
    inputs = arguments(3, 20, 64, 200, 32, dtype, torch.float32)
    grads = [torch.randn(3, 40, 64).to(dtype)]

    def plain(hidden, values, indices, weight, bias, pre_bias, mean, std):
        rows = (values.to(weight.dtype)[..., None] * weight[indices]).sum(2)
        concept = (rows + bias + pre_bias) * std + (hidden if residual else mean)
        return torch.stack([hidden, concept.to(hidden.dtype)], 2).flatten(1, 2)

    ours, truth = (partial(function, residual=residual) for function in (concept_mix, reference.concept_mix))
    exact = run(truth, cast(inputs, torch.float64), grads)
    assert_no_worse_than(*(sum(run(f, inputs, grads), []) for f in (plain, ours)), sum(exact, []))


def test_the_gradient_of_a_concept_that_every_token_keeps_adds_up_in_float32():
    inputs = arguments(1, 1000, k=1, dtype=torch.bfloat16, wide=torch.float32)
    for position, value in ((1, 1), (2, 3), (7, 1)):  # values, indices and std
        inputs[position] = torch.full_like(inputs[position], value)
    _, gradients = run(concept_mix, inputs, [torch.ones(1, 2000, 6)])
    assert gradients[3][3].eq(1000).all()  # in bfloat16 it would stop at 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wanted", [*((i,) for i in FLOATING), (0, 1), (3, 4, 5), (1, 3)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(wanted, dtype):
    inputs = arguments(dtype=dtype, wide=torch.promote_types(dtype, torch.float32))
    frozen = [i for i in range(8) if i not in wanted]
    grads = [torch.randn(2, 10, 6).to(dtype)]
    expected = run(reference.concept_mix, cast(inputs, torch.float64), grads, frozen)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-2
    assert_all_close(run(concept_mix, inputs, grads, frozen)[1], expected[1], tolerance, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_second_backward_pass_gives_the_same_gradients(dtype):
    inputs = leaves(arguments(dtype=dtype, wide=torch.promote_types(dtype, torch.float32)))
    wanted = [t for t in inputs if t.requires_grad]
    mixed = concept_mix(*inputs)
    grad = torch.randn_like(mixed)
    first = torch.autograd.grad(mixed, wanted, grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(mixed, wanted, grad)))


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 9000])  # one row, and a number that leaves a ragged last chunk
def test_chunks_do_not_change_the_result(chunk_bytes, monkeypatch):
    inputs = arguments(dtype=torch.bfloat16, wide=torch.float32)
    grads = [torch.randn(2, 10, 6)]
    whole = run(concept_mix, inputs, grads)
    set_chunk_bytes(monkeypatch, chunk_bytes)
    chunked = run(concept_mix, inputs, grads)
    assert_all_close(chunked[0], whole[0], 1e-2, 1e-2)
    assert_all_close(chunked[1], whole[1], 1e-2, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_neither_n_times_c_nor_n_times_k_times_d(dtype, monkeypatch):
    set_chunk_bytes(monkeypatch, 2**18)
    inputs = leaves(arguments(1, 512, 64, 1024, 32, dtype, torch.float32))
    _, _, largest = trace(lambda: concept_mix(*inputs).sum().backward())
    assert largest < 512 * 1024
    assert largest < 512 * 32 * 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_stay_as_they_were_under_anomaly_detection(dtype):
    inputs = leaves(arguments(dtype=dtype, wide=torch.promote_types(dtype, torch.float32)))
    kept = [t.detach().clone() for t in inputs]
    with torch.autograd.set_detect_anomaly(True):
        concept_mix(*inputs).sum().backward()
    assert all(map(torch.equal, inputs, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_need_not_be_contiguous(dtype):
    inputs = arguments(dtype=dtype, wide=torch.promote_types(dtype, torch.float32))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    grads = [torch.randn(2, 10, 6).to(dtype)]
    actual, expected = run(concept_mix, strided, grads), run(concept_mix, inputs, grads)
    assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 1e-6, 1e-6)


def test_indices_may_be_narrow_integers():
    inputs = arguments()
    expected = concept_mix(*inputs)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(concept_mix(*inputs[:2], inputs[2].to(dtype), *inputs[3:]), expected)


REFUSED = [
    ("hidden", torch.randn(2, 5), r"hidden has shape \[2, 5\], expected \[B, T, d\]"),
    ("values", torch.randn(2, 4, 4), r"values has shape \[2, 4, 4\], expected \[B, T, k\] with B=2, T=5"),
    ("indices", torch.zeros(2, 5, 3).long(), r"indices has shape \[2, 5, 3\], expected \[B, T, k\] with .*k=4"),
    ("weight", torch.randn(30, 5), r"weight has shape \[30, 5\], expected \[C, d\] with .*d=6"),
    ("bias", torch.randn(5), r"bias has shape \[5\], expected \[d\] with d=6"),
    ("pre_bias", torch.randn(1, 6), r"pre_bias has shape \[1, 6\], expected \[d\]"),
    ("mean", torch.randn(2, 5), r"mean has shape \[2, 5\], expected \[B, T, 1\]"),
    ("std", torch.randn(2, 5, 6), r"std has shape \[2, 5, 6\], expected \[B, T, 1\]"),
    ("weight", torch.randn(30, 6).bfloat16(), "weight has dtype torch.bfloat16 but hidden has torch.float32"),
    ("values", torch.ones(2, 5, 4).long(), "values has dtype torch.int64, expected a floating-point dtype"),
    ("std", torch.ones(2, 5, 1).long(), "std has dtype torch.int64, expected a floating-point dtype"),
    ("indices", torch.zeros(2, 5, 4), "indices has dtype torch.float32, expected "),
    ("indices", torch.full((2, 5, 4), 30), "indices holds values from 30 to 30, expected 0 to 29"),
    ("indices", torch.full((2, 5, 4), -1), "indices holds values from -1 to -1, expected 0 to 29"),
]


@pytest.mark.parametrize("operation", [concept_mix, concept_add])
@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(name, value, message, operation):
    fitting = dict(zip(NAMES, arguments(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=f"{operation.__name__}: {message}"):
        operation(**(fitting | {name: value}))


@pytest.mark.parametrize("name", NAMES[1:])
def test_another_device_is_refused_by_name(name):
    fitting = dict(zip(NAMES, arguments(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=f"concept_mix: {name} is on meta but hidden is on cpu"):
        concept_mix(**(fitting | {name: fitting[name].to("meta")}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("operation", "positions"), [(concept_mix, 2), (concept_add, 1), (partial(concept_mix, residual=True), 2)]
)
def test_compiles_into_one_graph(operation, positions, dtype):
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 5), (2, 8)):
        inputs = arguments(batch, length, dtype=dtype, wide=torch.float32)
        grads = [torch.randn(batch, positions * length, 6).to(dtype)]
        actual, expected = run(compiled, inputs, grads), run(operation, inputs, grads)
        assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 1e-6, 1e-6)
