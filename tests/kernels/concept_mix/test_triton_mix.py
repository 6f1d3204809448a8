"""The Triton backend of `concept_mix` and `concept_add` against the reference: outputs, every gradient, precision."""

from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, assert_all_close, assert_no_worse_than, cast, gpu_only, leaves, relative_error, run

from cocomix_kernels import concept_add, concept_mix, reference
from cocomix_kernels.common.recording import recording

FLOATING = (0, 1, 3, 4, 5, 6, 7)
OPERATIONS = {
    "concept_mix": (partial(concept_mix, backend="triton"), reference.concept_mix, 2),
    "concept_add": (partial(concept_add, backend="triton"), reference.concept_add, 1),
    "residual": (
        partial(concept_mix, residual=True, backend="triton"),
        partial(reference.concept_mix, residual=True),
        2,
    ),
}  # with the positions that a token has in the output
both = pytest.mark.parametrize("name", OPERATIONS)
NARROW = (torch.bfloat16, torch.float16)
# Triton's interpreter truncates float32 to bfloat16, which makes the error of rounding twice as large.
FACTOR = 1.5 if DEVICE.type == "cuda" else 3.5


@pytest.fixture(autouse=True)
def _fresh_buffers_hold_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def arguments(batch=2, length=5, d=6, width=12, k=4, dtype=torch.float32, wide=torch.float32):
    """hidden, values, indices, weight, bias, pre_bias, mean, std; values, mean and std have the dtype `wide`."""
    shapes = (batch, length, d), (batch, length, k), (width, d), (d,), (d,), (batch, length, 1), (batch, length, 1)
    hidden, values, weight, bias, pre_bias, mean, std = (torch.randn(s, device=DEVICE) for s in shapes)
    indices = torch.rand(batch, length, width, device=DEVICE).argsort(2)[..., :k]
    narrow, wide_ones = cast((hidden, weight, bias, pre_bias), dtype), cast((values, mean, std.abs() + 0.5), wide)
    return [narrow[0], wide_ones[0], indices, *narrow[1:], *wide_ones[1:]]


def cotangent(inputs, positions, dtype=torch.float32):
    """A gradient for the output of an operation on these inputs."""
    batch, length, d = inputs[0].shape
    return [torch.randn(batch, positions * length, d, device=DEVICE).to(dtype)]


@given(
    st.sampled_from(list(OPERATIONS)),
    st.integers(0, 2),
    st.sampled_from((1, 3)),
    st.sampled_from((1, 6, 130)),
    st.sampled_from((1, 7, 20)),
    st.data(),
    st.integers(0, 2**32),
)
@settings(max_examples=20, phases=[Phase.generate])  # shrinking would take the interpreter minutes
def test_outputs_and_gradients_equal_the_reference_for_any_shape(name, batch, length, d, width, data, seed):
    torch.manual_seed(seed)
    operation, truth, positions = OPERATIONS[name]
    k = data.draw(st.one_of(st.just(1), st.just(width), st.integers(1, width)), label="k")
    inputs = arguments(batch, length, d, width, k)
    grads = cotangent(inputs, positions)
    actual, expected = run(operation, inputs, grads), run(truth, cast(inputs, torch.float64), grads)
    assert_all_close(actual[0], expected[0], 1e-4, 1e-4)
    assert_all_close(actual[1], expected[1], 1e-4, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_a_residual_without_a_concept_repeats_the_hidden_states(dtype):
    hidden, values, indices, weight, bias, pre_bias, mean, std = arguments(dtype=dtype)
    nothing = [torch.zeros_like(t) for t in (weight, bias, pre_bias)]
    for backend in ("triton", "torch"):
        mixed = concept_mix(hidden, values, indices, *nothing, mean, std, residual=True, backend=backend)
        assert torch.equal(mixed[:, ::2], hidden) and torch.equal(mixed[:, 1::2], hidden)


@both
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_no_tokens_make_an_empty_output_and_gradients_of_zero(name, shape):
    operation, _, positions = OPERATIONS[name]
    inputs = leaves(arguments(*shape))
    mixed = operation(*inputs)
    assert mixed.shape == (shape[0], positions * shape[1], 6)
    mixed.sum().backward()
    assert not any(inputs[i].grad.any() for i in (3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_even_rows_are_exactly_the_hidden_states_and_so_are_their_gradients(dtype):
    inputs = arguments(dtype=dtype)
    grads = cotangent(inputs, 2, dtype)
    (mixed,), gradients = run(OPERATIONS["concept_mix"][0], inputs, grads)
    assert torch.equal(mixed[:, ::2], inputs[0])
    assert torch.equal(gradients[0], grads[0][:, ::2])


@both
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("same", [True, False])
def test_every_input_keeps_its_dtype_and_low_precision_is_as_exact_as_pytorch(name, dtype, same):
    operation, truth, positions = OPERATIONS[name]
    inputs = arguments(2, 8, 64, 60, 16, dtype, dtype if same else torch.float32)
    grads = cotangent(inputs, positions, dtype)

    def plain(hidden, values, indices, weight, bias, pre_bias, mean, std):
        rows = (values.to(weight.dtype)[..., None] * weight[indices]).sum(2)
        concept = ((rows + bias + pre_bias) * std + (hidden if name == "residual" else mean)).to(hidden.dtype)
        return torch.stack([hidden, concept], 2).flatten(1, 2) if positions == 2 else hidden + concept

    exact = run(truth, cast(inputs, torch.float64), grads)
    outputs, gradients = run(operation, inputs, grads)
    assert outputs[0].dtype == dtype
    assert all(g is None or g.dtype == t.dtype for t, g in zip(inputs, gradients, strict=True))
    assert_no_worse_than(sum(run(plain, inputs, grads), []), outputs + gradients, sum(exact, []), FACTOR)


@both
def test_float32_is_as_exact_as_the_torch_backend(name):
    operation, truth, positions = OPERATIONS[name]
    inputs = arguments(2, 20, 64, 60, 16)
    grads = cotangent(inputs, positions)
    exact = run(truth, cast(inputs, torch.float64), grads)
    plain = run(partial(operation, backend="torch"), inputs, grads)
    assert_no_worse_than(*(sum(r, []) for r in (plain, run(operation, inputs, grads), exact)))


def test_the_gradient_of_a_concept_that_every_token_keeps_adds_up_in_float32():
    operation, _, positions = OPERATIONS["concept_mix"]
    inputs = arguments(1, 300, k=1, width=2, dtype=torch.bfloat16)  # more than one piece of pairs
    for position, value in ((1, 1), (2, 1), (7, 1)):  # values, indices and std
        inputs[position] = torch.full_like(inputs[position], value)
    _, gradients = run(operation, inputs, [torch.ones(1, positions * 300, 6, device=DEVICE)])
    expected = torch.tensor(300.0).bfloat16()
    assert gradients[3][1].eq(expected).all() and gradients[3][0].eq(0).all()  # in bfloat16 it would stop at 256
    assert gradients[4].eq(expected).all() and gradients[5].eq(expected).all()


@both
@pytest.mark.parametrize("wanted", [*((i,) for i in FLOATING), (0, 1), (3, 4, 5), (1, 6), (3, 7)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(name, wanted):
    if (name, wanted) == ("residual", (6,)):
        pytest.skip("the residual form does not depend on the mean")
    operation, truth, positions = OPERATIONS[name]
    inputs = arguments()
    frozen = [i for i in range(8) if i not in wanted]
    grads = cotangent(inputs, positions)
    expected = run(truth, cast(inputs, torch.float64), grads, frozen)
    assert_all_close(run(operation, inputs, grads, frozen)[1], expected[1], 1e-4, 1e-4)


@both
@pytest.mark.parametrize(
    ("wanted", "started"),
    [
        ((0,), set()),
        ((1,), {"_mix_gradients"}),
        ((3,), {"_scatter_pieces"}),
        ((4,), {"_scatter_pieces"}),
        ((6,), {"_mix_gradients"}),
        ((1, 5, 7), {"_mix_gradients", "_scatter_pieces"}),
    ],
)
def test_no_kernel_runs_for_frozen_inputs(name, wanted, started):
    if (name, wanted) == ("residual", (6,)):
        started = set()  # it does not depend on the mean
    inputs = [t.cpu().requires_grad_(i in wanted) for i, t in enumerate(arguments())]
    mixed = OPERATIONS[name][0](*(t.to(DEVICE) for t in inputs))
    with recording((9, 0)) as launches:
        mixed.sum().backward()
    assert {launch.kernel.__name__ for launch in launches} == started


@both
def test_a_second_backward_pass_gives_the_same_gradients_bit_for_bit(name):
    inputs = leaves(arguments(1, 40, k=3, width=4))
    wanted = [t for t in inputs if t.requires_grad]
    if name == "residual":  # does not depend on the mean
        del wanted[5]
    mixed = OPERATIONS[name][0](*inputs)
    grad = torch.randn_like(mixed)
    first = torch.autograd.grad(mixed, wanted, grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(mixed, wanted, grad)))


@both
def test_inputs_and_gradients_need_not_be_contiguous_and_stay_as_they_were(name):
    operation, _, positions = OPERATIONS[name]
    inputs = arguments()
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    kept = [t.clone() for t in strided]
    grads = cotangent(inputs, positions)
    actual = run(operation, strided, [grads[0].transpose(0, 2).contiguous().transpose(0, 2)])
    expected = run(operation, inputs, grads)
    assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 0, 0)
    assert all(map(torch.equal, strided, kept))
    summed = leaves(inputs)
    operation(*summed).sum().backward()  # one gradient for all elements, expanded
    assert_all_close([t.grad for t in summed], run(operation, inputs, [torch.ones_like(grads[0])])[1], 0, 0)


@both
def test_indices_may_be_narrow_integers(name):
    operation, _, positions = OPERATIONS[name]
    inputs = arguments()
    grads = cotangent(inputs, positions)
    expected = run(operation, inputs, grads)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        actual = run(operation, [*inputs[:2], inputs[2].to(dtype), *inputs[3:]], grads)
        assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 0, 0)


@both
@pytest.mark.parametrize("position", [0, 1, 6, 7])
def test_float64_is_refused_on_demand_and_left_to_torch_otherwise(name, position, monkeypatch):
    operation, truth, _ = OPERATIONS[name]
    inputs = arguments()
    changed = (0, 3, 4, 5) if position == 0 else (position,)
    inputs = [t.double() if i in changed else t for i, t in enumerate(inputs)]
    with pytest.raises(ValueError, match=f"{'concept_mix' if name == 'residual' else name}: no triton backend exists"):
        operation(*inputs)
    monkeypatch.setenv("COCOMIX_BACKEND", "triton")
    expected = truth(*cast(inputs, torch.float64))
    assert_all_close([operation(*inputs, backend=None)], [expected], 1e-4, 1e-4)


@both
@pytest.mark.parametrize("frozen", [(), (0, 1, 6, 7), (3, 4, 5)])
def test_compiles_into_one_graph_forward_and_backward(name, frozen):
    operation, _, positions = OPERATIONS[name]
    torch.compiler.reset()  # the two operations are partial functions, which share a frame and its limit of graphs
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    for length in (5, 8):
        inputs = arguments(2, length)
        grads = cotangent(inputs, positions)
        actual, expected = run(compiled, inputs, grads, frozen), run(operation, inputs, grads, frozen)
        assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 1e-6, 1e-6)


@pytest.mark.parametrize(("interleaved", "residual"), [(True, False), (False, False), (True, True)])
def test_is_registered_as_pytorch_expects_an_operator(interleaved, residual):
    torch.use_deterministic_algorithms(False)  # it compares fresh buffers of operators that write none
    torch.library.opcheck(torch.ops.cocomix.concept_mix.default, (*leaves(arguments(1, 2)), interleaved, residual))


@gpu_only
@both
@pytest.mark.parametrize("d", [512, 1024, 2048])
def test_paper_shapes_are_as_exact_as_the_torch_backend(name, d):
    operation, _, positions = OPERATIONS[name]
    inputs = arguments(1, 1, d, 32768, 1, torch.bfloat16)
    batch, length, k = 32, 1024, 32
    inputs[0] = torch.randn(batch, length, d, device=DEVICE).bfloat16()
    inputs[1] = torch.randn(batch, length, k, device=DEVICE)
    inputs[2] = torch.randint(1024, (batch, length, k), device=DEVICE) + torch.arange(0, 32768, 1024, device=DEVICE)
    inputs[2][..., 0] = 5  # in every token
    inputs[6], inputs[7] = torch.randn(batch, length, 1, device=DEVICE), torch.rand(batch, length, 1, device=DEVICE)
    grads = cotangent(inputs, positions, torch.bfloat16)
    exact = run(partial(operation, backend="torch"), cast(inputs, torch.float32), grads)
    outputs, gradients = run(operation, inputs, grads)
    for actual, expected in zip(outputs + gradients, exact[0] + exact[1], strict=True):
        if expected is not None:
            rounded = max(relative_error(expected.to(actual.dtype), expected), 1e-5)
            assert relative_error(actual, expected) <= 1.5 * rounded
