"""`linear_distillation` with both kinds of targets against the reference, and what holds of the KL itself."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    assert_all_close,
    assert_no_worse_than,
    cast,
    leaves,
    run,
    set_chunk_bytes,
    trace,
)

from cocomix_kernels import FullTargets, TopTargets, linear_cross_entropy, linear_distillation, reference, top_targets

N, D, V, D_T, PADDED, J = 23, 6, 50, 9, 64, 5
KINDS = pytest.mark.parametrize("kind", [FullTargets, TopTargets])
IGNORED = -100
GRAD = torch.tensor(1.3, dtype=torch.float64)  # what comes back through the loss


def teacher(n=N, width=V, d=D_T, padded=PADDED, dtype=torch.float64):
    """The hidden states and the head, of a sharpness such that a few tokens take most of the mass."""
    return FullTargets(torch.randn(n, d).to(dtype), torch.randn(padded, d).to(dtype))


def top_of(full, width=V, j=J, dtype=torch.float64):
    """The j most probable tokens of the teacher, in no particular order."""
    log_p = (full.hidden.double() @ full.weight[:width].double().T).log_softmax(1)
    log_probs, ids = log_p.topk(j)
    order = torch.randperm(j)
    return TopTargets(ids[:, order], log_probs[:, order].to(dtype))


def layer(kind, n=N, d=D, width=V, dtype=torch.float64, j=J, ignore_index=IGNORED):
    """x, weight, labels (a quarter ignored) and the two tensors of the targets."""
    labels = torch.randint(width, (n,))
    labels[::4] = ignore_index
    full = teacher(n, width, padded=width + 14, dtype=dtype)
    targets = full if kind is FullTargets else top_of(full, width, j)
    return [torch.randn(n, d).to(dtype), torch.randn(width, d).to(dtype), labels, *targets]


def operation(kind, distillation_weight=0.7, function=linear_distillation, **options):
    """The function of `layer`'s five tensors; losses in a tuple."""
    return lambda x, weight, labels, *targets: function(
        x, weight, labels, kind(*targets), distillation_weight, **options
    )


def outcome(function, inputs, frozen=()):
    """Losses, and the gradients of x and weight through the first."""
    losses, gradients = run(function, inputs, [GRAD, None, None], (*frozen, 3, 4))
    return losses + gradients[:2]


def compare(kind, inputs, distillation_weight=0.7, frozen=(), rtol=1e-9, atol=1e-11, **options):
    actual = outcome(operation(kind, distillation_weight, **options), inputs, frozen)
    naive = operation(kind, distillation_weight, reference.linear_distillation, **options)
    expected = outcome(naive, cast(inputs, torch.float64), frozen)
    assert_all_close(actual, expected, rtol, atol)
    return actual


# Against the reference


@KINDS
@pytest.mark.parametrize("ignore_index", [IGNORED, -1, 3])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_losses_and_gradients_equal_the_reference(kind, ignore_index, frozen):
    compare(kind, layer(kind, ignore_index=ignore_index), frozen=frozen, ignore_index=ignore_index)


@KINDS
@pytest.mark.parametrize("distillation_weight", [0, 0.1, 1, 25.0])
def test_the_weight_scales_the_kl_alone(kind, distillation_weight):
    inputs = layer(kind)
    loss, ntp_loss, kl, *gradients = compare(kind, inputs, distillation_weight)
    torch.testing.assert_close(loss, ntp_loss + distillation_weight * kl)
    if distillation_weight == 0:
        expected = run(linear_cross_entropy, inputs[:3], [GRAD])
        assert_all_close([ntp_loss, *gradients], expected[0] + expected[1][:2])


@KINDS
@given(
    n=st.sampled_from((1, 2, 63, 64, 65, 200)),
    d=st.integers(1, 5),
    width=st.sampled_from((1, 2, 7, 64, 65, 300)),
    share=st.floats(0, 1),
    ignored=st.sampled_from((0.0, 0.5, 0.9)),
    rows=st.sampled_from((1, 7, 1000)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_any_shape(kind, n, d, width, share, ignored, rows, seed):
    torch.manual_seed(seed)
    inputs = layer(kind, n, d, width, j=max(1, round(share * width)))
    inputs[2] = torch.where(torch.rand(n) < ignored, IGNORED, inputs[2].clamp(min=0))
    inputs[2][-1] = width - 1
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_chunk_bytes(monkeypatch, 8 * width * rows)
        compare(kind, inputs, rtol=1e-8, atol=1e-10)


@KINDS
@pytest.mark.parametrize("j", [1, 3, 5])
def test_gradients_pass_gradcheck(kind, j):
    x, weight, *others = layer(kind, 7, 3, 5, j=j)
    x, weight = leaves([x, weight])
    assert torch.autograd.gradcheck(lambda x, w: operation(kind)(x, w, *others).loss, (x, weight))


@KINDS
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_do_not_change_the_result(kind, rows, dtype, monkeypatch):
    inputs = layer(kind, dtype=dtype)
    whole = outcome(operation(kind), inputs)
    set_chunk_bytes(monkeypatch, rows * V * dtype.itemsize)
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    assert_all_close(outcome(operation(kind), inputs), whole, tight, tight)


@KINDS
@pytest.mark.parametrize("rows", [2000, 25])
def test_bfloat16_is_as_exact_as_pytorch_however_many_chunks(kind, rows, monkeypatch):
    inputs = layer(kind, 2000, 64, 500, torch.bfloat16)
    set_chunk_bytes(monkeypatch, 4 * 500 * rows)
    inputs[0] /= 8  # logits of about one, as in training

    def plain(*tensors):
        logits = (tensors[0] @ tensors[1].T).float()
        targets = kind(*tensors[3:])
        if kind is FullTargets:
            targets = FullTargets((targets.hidden @ targets.weight[:500].T).float(), torch.eye(500))
        return reference.linear_distillation(logits, torch.eye(500), tensors[2], targets, 0.7)

    exact = outcome(operation(kind, function=reference.linear_distillation), cast(inputs, torch.float64))
    actual, expected = outcome(operation(kind), inputs), outcome(plain, inputs)
    assert_no_worse_than(expected[3:], actual[3:], exact[3:])
    for ours, theirs, truth in zip(actual[:3], expected[:3], exact[:3], strict=True):
        assert (ours - truth).abs() <= max(1.5 * (theirs - truth).abs(), 1e-5 * truth)  # zero by luck


@KINDS
def test_inputs_may_have_any_strides(kind):
    inputs = layer(kind)
    expected = outcome(operation(kind), inputs)
    strided = [t.repeat_interleave(2, -1)[..., ::2] if t.ndim == 1 else t.T.contiguous().T for t in inputs]
    assert not any(t.is_contiguous() for t in strided)

    def gradients(tensors):
        wanted = [t.requires_grad_() for t in tensors[:2]]
        losses = operation(kind)(*tensors)
        return [t.detach() for t in losses] + list(torch.autograd.grad(1.3 * losses.loss, wanted))

    assert_all_close(gradients(strided), expected, 1e-12, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
def test_the_teacher_has_a_dtype_of_its_own(student, dtype):
    inputs = layer(FullTargets, dtype=torch.float32)
    inputs = cast(inputs[:3], student) + cast(inputs[3:], dtype)
    loss, ntp_loss, kl, dx, dw = compare(FullTargets, inputs, rtol=1e-2, atol=1e-2)
    assert loss.dtype == ntp_loss.dtype == kl.dtype == torch.float32 and dx.dtype == dw.dtype == student
    exact = operation(FullTargets, function=reference.linear_distillation)(*cast(inputs, torch.float64))
    rounding = 1e-5 if student == torch.float32 else 1e-2  # a CPU's products round the student's logits to its dtype
    assert kl == pytest.approx(exact.kl.item(), rel=rounding)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int16, torch.uint8])
def test_top_targets_may_be_as_narrow_as_a_cache_holds_them(ids_dtype):
    inputs = layer(TopTargets)
    inputs[3], inputs[4] = inputs[3].to(ids_dtype), inputs[4].half()
    inputs[2] = inputs[2].int()
    compare(TopTargets, inputs)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_losses_and_gradients_equal_the_reference(kind, dtype, monkeypatch):
    set_chunk_bytes(monkeypatch, 2**20)
    inputs = [t.to(DEVICE) for t in layer(kind, 300, 64, 1000, dtype)]
    inputs[0] /= 8
    tolerance = 1e-2 if dtype == torch.float32 else 5e-2  # products may run in TF32
    compare(kind, inputs, rtol=tolerance, atol=tolerance)


# What holds of the KL


def test_the_kl_is_that_of_the_library():
    x, weight, labels, hidden, head = layer(FullTargets)
    kept = labels != IGNORED
    log_q, log_p = (x @ weight.T).log_softmax(1)[kept], (hidden @ head[:V].T).log_softmax(1)[kept]
    found = operation(FullTargets)(x, weight, labels, hidden, head)
    torch.testing.assert_close(found.kl, F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))
    torch.testing.assert_close(found.ntp_loss, F.nll_loss(log_q, labels[kept]))


def test_padding_rows_of_the_teachers_head_count_for_nothing():
    x, weight, labels, hidden, head = layer(FullTargets)
    expected = outcome(operation(FullTargets), [x, weight, labels, hidden, head[:V]])
    head[V:] *= 100
    assert_all_close(outcome(operation(FullTargets), [x, weight, labels, hidden, head]), expected, 0, 0)


def test_all_tokens_as_top_targets_are_the_whole_distribution():
    x, weight, labels, *full = layer(FullTargets)
    expected = outcome(operation(FullTargets), [x, weight, labels, *full])
    every = top_of(FullTargets(*full), j=V)
    assert_all_close(outcome(operation(TopTargets), [x, weight, labels, *every]), expected)
    rounded = outcome(operation(TopTargets), [x, weight, labels, every.ids, every.log_probs.half()])
    assert_all_close(rounded, expected, 1e-3, 1e-3)  # sums that are not quite 1 are no mass of another token


def test_fewer_tokens_never_give_a_larger_kl():
    x, weight, labels, *full = layer(FullTargets)
    whole = operation(FullTargets)(x, weight, labels, *full).kl
    found = []
    for j in (1, 2, 5, 20, 49, 50):
        log_p = (full[0] @ full[1][:V].T).log_softmax(1)
        ids = log_p.argsort(1, descending=True)[:, :j]
        found.append(operation(TopTargets)(x, weight, labels, ids, log_p.gather(1, ids)).kl)
    found = torch.stack(found)
    assert (found.diff() > -1e-12).all() and (found <= whole + 1e-12).all()  # the j kept are nested
    assert 0 < found[0] < 0.9 * whole


@KINDS
def test_a_student_that_is_the_teacher_has_no_kl(kind):
    x, weight, labels, *_ = layer(kind)
    full = FullTargets(x, weight)
    loss, ntp_loss, kl, *gradients = outcome(
        operation(kind), [x, weight, labels, *(full if kind is FullTargets else top_of(full))]
    )
    assert abs(kl) < 1e-12
    expected = run(linear_cross_entropy, [x, weight, labels], [GRAD])
    assert_all_close([loss, *gradients], expected[0] + expected[1][:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_leaves_nothing_for_the_other_tokens_has_a_finite_kl(dtype):
    weight, x = torch.eye(6, dtype=dtype), torch.zeros(2, 6, dtype=dtype)
    x[:, 0] = 900  # exp(-900) is zero
    targets = TopTargets(torch.tensor([[0], [0]]), torch.tensor([[0.5], [0.5]], dtype=dtype).log())
    loss, ntp_loss, kl, dx, dw = outcome(operation(TopTargets, 1.0), [x, weight, torch.zeros(2).long(), *targets])
    assert kl == pytest.approx(-0.6931472 + 0.5 * (900 - 1.6094379))
    torch.testing.assert_close(dx[0] * 2 / 1.3, torch.tensor([0.5, *[-0.1] * 5], dtype=dtype))  # q - p


def test_log_probs_that_rounding_pushed_over_one_and_zero_probabilities():
    x, weight, labels, *_ = layer(TopTargets)
    log_probs = torch.tensor([[0.75, 0.2505, 0.0]]).log().half().expand(N, 3)
    assert log_probs.double().exp().sum(1).min() > 1 and log_probs.isinf().any()
    ids = torch.stack([torch.randperm(V)[:3] for _ in range(N)])
    compare(TopTargets, [x, weight, labels, ids, log_probs])


# Ignored rows, autograd, memory


@KINDS
def test_ignored_rows_reach_nothing_whatever_their_targets_hold(kind):
    inputs = layer(kind)
    ignored = inputs[2] == IGNORED
    inputs[0][ignored] *= 50
    expected = compare(kind, inputs)
    assert (expected[3][ignored] == 0).all() and (expected[3][~ignored] != 0).all()
    alone = outcome(
        operation(kind),
        [inputs[0][~ignored], inputs[1], inputs[2][~ignored], *(t[~ignored] if len(t) == N else t for t in inputs[3:])],
    )
    assert_all_close([*expected[:3], expected[4]], [*alone[:3], alone[4]])
    for target in inputs[3:]:
        if len(target) == N:
            target[ignored] = torch.nan if target.is_floating_point() else -7
    assert_all_close(outcome(operation(kind), inputs), expected, 0, 0)


@KINDS
@pytest.mark.parametrize("n", [0, 5])
def test_without_any_label_the_losses_are_nan_and_the_gradients_zero(kind, n):
    inputs = layer(kind, n)
    inputs[2].fill_(IGNORED)
    *losses, dx, dw = outcome(operation(kind), inputs)
    assert torch.stack(losses).isnan().all()
    assert (dx == 0).all() and (dw == 0).all()


@KINDS
def test_only_the_loss_carries_gradients_and_only_to_the_student(kind):
    inputs = leaves(layer(kind))
    loss, ntp_loss, kl = operation(kind)(*inputs)
    assert loss.requires_grad and not ntp_loss.requires_grad and not kl.requires_grad
    loss.backward()
    assert all(t.grad is not None for t in inputs[:2]) and all(t.grad is None for t in inputs[2:])
    with torch.no_grad():
        again = operation(kind)(*inputs)
    assert not again.loss.requires_grad and again.loss == loss


@KINDS
def test_a_second_backward_pass_gives_the_same_gradients(kind):
    x, weight, *others = leaves(layer(kind))
    loss = operation(kind)(x, weight, *others).loss
    grad = torch.tensor(0.3, dtype=torch.float64)
    first = torch.autograd.grad(loss, (x, weight), grad, retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight), 2 * grad)
    assert_all_close(second, [2 * t for t in first], 1e-15, 0)
    with pytest.raises(RuntimeError):
        loss = operation(kind)(x, weight, *others).loss
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), weight)


@KINDS
def test_the_weight_may_go_once_the_forward_pass_is_over(kind):
    inputs = layer(kind)
    expected = outcome(operation(kind), inputs)
    x, weight, *others = leaves(inputs)
    loss = operation(kind)(x, weight, *others).loss
    for tensor in (x, weight, *others):  # as a partitioned parameter does, which gets its shape back in time
        tensor.data.fill_(7)
    loss.backward(GRAD)
    assert_all_close([x.grad, weight.grad], expected[3:], 0, 0)


@KINDS
def test_inputs_stay_as_they_were_under_anomaly_detection(kind):
    inputs = leaves(layer(kind))
    kept = [t.detach().clone() for t in inputs]
    with torch.autograd.set_detect_anomaly(True):
        operation(kind)(*inputs).loss.backward()
    assert all(map(torch.equal, inputs, kept))


@KINDS
def test_a_nan_reaches_the_losses(kind):
    for position in (0, 3 if kind is FullTargets else 4):
        inputs = layer(kind)
        inputs[position][1] = torch.nan
        assert operation(kind)(*inputs).loss.isnan()


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_n_times_v_elements_is_ever_held(kind, dtype, monkeypatch):
    set_chunk_bytes(monkeypatch, 2**20)
    n, width = 4096, 1000
    inputs = layer(kind, n, 8, width, dtype)
    inputs[:2] = leaves(inputs[:2])
    products, peak, largest = trace(lambda: operation(kind)(*inputs).loss.backward())
    assert largest < n * width
    assert peak < (2 if kind is TopTargets else 4) * n * width  # bytes; float32 logits alone are twice or once that
    teachers = n * width * D_T if kind is FullTargets else 0
    assert sum(products.values()) == 3 * n * width * 8 + teachers


@KINDS
def test_the_backward_pass_holds_nothing_beside_its_gradients(kind):
    x, weight, *others = leaves(layer(kind, 8, 64, 1000, torch.float32))
    loss = operation(kind)(x, weight, *others).loss
    _, peak, _ = trace(lambda: torch.autograd.grad(loss, (x, weight)))
    assert peak < 1.1 * (x.nbytes + weight.nbytes)


@KINDS
def test_without_gradients_only_the_logits_are_computed(kind):
    inputs = layer(kind, 256, 8, 300, torch.float32)
    products, *_ = trace(lambda: operation(kind)(*inputs))
    assert sum(products.values()) == 256 * 300 * (8 + (D_T if kind is FullTargets else 0))
    inputs[1].requires_grad_()
    products, *_ = trace(lambda: operation(kind)(*inputs))
    assert sum(products.values()) == 256 * 300 * (16 + (D_T if kind is FullTargets else 0))


@KINDS
def test_compiles_without_graph_breaks(kind):
    compiled = torch.compile(lambda *inputs: operation(kind)(*inputs).loss, backend="aot_eager", fullgraph=True)
    inputs = layer(kind, dtype=torch.float32)
    actual = run(compiled, inputs, [GRAD], (3, 4))
    expected = outcome(operation(kind), inputs)
    assert_all_close(actual[0] + actual[1][:2], [expected[0], *expected[3:]], 1e-5, 1e-6)


@KINDS
def test_the_operators_pass_pytorchs_own_checks(kind):
    x, weight, labels, *targets = layer(kind, 7, 3, 5, j=2)
    full = kind is FullTargets
    torch.library.opcheck(
        torch.ops.cocomix.lm_head_losses.default,
        (x.requires_grad_(), weight.requires_grad_(), labels, IGNORED, *targets, full, 0.7, True, True),
    )
    torch.library.opcheck(
        torch.ops.cocomix.lm_head_losses_backward.default,
        (GRAD, torch.tensor(0.2).double(), x.detach(), weight.detach()),
    )


# Refusals

FULL = FullTargets(torch.randn(4, 2), torch.randn(11, 2))
TOP = TopTargets(torch.tensor([[0, 1]] * 4), torch.full((4, 2), -1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(4)), r"x has shape \[4\], expected \[N, d\]"),
        (dict(weight=torch.randn(9, 2)), r"weight has shape \[9, 2\], expected \[V, d\] with .*d=3"),
        (dict(labels=torch.zeros(5).long()), r"labels has shape \[5\], expected \[N\] with N=4"),
        (dict(weight=torch.randn(9, 3).bfloat16()), "weight has dtype torch.bfloat16 but x has torch.float32"),
        (dict(x=torch.ones(4, 3).long()), "x has dtype torch.int64, expected a floating-point dtype"),
        (dict(labels=torch.zeros(4)), "labels has dtype torch.float32, expected "),
        (dict(weight=torch.randn(9, 3, device="meta")), "weight is on meta but x is on cpu"),
        (dict(labels=torch.tensor([0, 9, -100, 1])), "labels holds values from 0 to 9, expected 0 to 8"),
        (dict(targets=tuple(FULL)), "targets is a tuple, expected FullTargets or TopTargets"),
        (dict(targets=FULL._replace(hidden=torch.randn(5, 2))), r"targets.hidden has shape \[5, 2\], .*N=4"),
        (dict(targets=FULL._replace(weight=torch.randn(11, 3))), r"targets.weight has shape \[11, 3\], .*d_t=2"),
        (dict(targets=FULL._replace(weight=torch.randn(8, 2))), "targets.weight has 8 rows, expected at least the 9"),
        (dict(targets=FULL._replace(hidden=FULL.hidden.half())), "targets.weight has dtype .* targets.hidden has "),
        (dict(targets=FullTargets(*(t.to("meta") for t in FULL))), "targets.hidden is on meta but x is on cpu"),
        (dict(targets=TOP._replace(ids=TOP.ids[:, :1])), r"targets.log_probs has shape \[4, 2\], .*J=1"),
        (dict(targets=TopTargets(*(t[:3] for t in TOP))), r"targets.ids has shape \[3, 2\], .*N=4"),
        (dict(targets=TOP._replace(ids=TOP.log_probs)), "targets.ids has dtype torch.float32, expected "),
        (dict(targets=TOP._replace(log_probs=TOP.ids)), "targets.log_probs has dtype torch.int64, expected a float"),
        (dict(targets=TOP._replace(ids=TOP.ids.to("meta"))), "targets.ids is on meta but x is on cpu"),
        (dict(targets=TOP._replace(ids=TOP.ids + 8)), "targets.ids holds values from 8 to 9, expected 0 to 8"),
        (dict(targets=TOP._replace(ids=TOP.ids - 1)), "targets.ids holds values from -1 to 0, expected 0 to 8"),
        (dict(targets=TopTargets(*(t[:, :0] for t in TOP))), "J, the width of targets.ids, is 0, expected 1 to 9"),
        (dict(targets=TopTargets(*(t.repeat(1, 5) for t in TOP))), "J, the width .* is 10, expected 1 to 9"),
        (dict(distillation_weight=-0.1), "distillation_weight is -0.1, expected a finite number, 0 or more"),
        (dict(distillation_weight=float("nan")), "distillation_weight is nan"),
        (dict(distillation_weight=float("inf")), "distillation_weight is inf"),
        (dict(backend="triton"), "no triton backend exists for this operation"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    fitting = dict(
        x=torch.randn(4, 3),
        weight=torch.randn(9, 3),
        labels=torch.zeros(4).long(),
        targets=FULL,
        distillation_weight=0.5,
    )
    with pytest.raises(ValueError, match="linear_distillation: " + message):
        linear_distillation(**(fitting | change))


# ---- what a teacher keeps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top_targets_are_the_largest_of_the_whole_distribution_in_any_chunks(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, generator=generator).to(dtype) for size in ((9, 6), (40, 6)))
    expected = (hidden.double() @ weight.double().T).log_softmax(1).topk(5)
    found = top_targets(hidden, weight, 5)
    assert found.ids.dtype == torch.int64
    assert found.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found.ids, expected.indices)
    torch.testing.assert_close(found.log_probs.double(), expected.values, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(
        sys.modules["cocomix_kernels.lm_loss.distillation"],
        "row_chunks",
        lambda n, *_: [slice(i, min(i + 2, n)) for i in range(0, n, 2)],
    )
    chunked = top_targets(hidden, weight, 5)
    assert torch.equal(chunked.ids, found.ids)
    torch.testing.assert_close(chunked.log_probs, found.log_probs)
    with pytest.raises(ValueError, match="top_targets"):
        top_targets(hidden, weight, 41)
    with pytest.raises(ValueError, match="top_targets"):
        top_targets(hidden, weight[:, :5], 3)


def test_targets_of_windows_become_those_of_what_their_tokens_predict():
    hidden, head, ids = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(7, (2, 3, 5))
    full = FullTargets(hidden, head).of_predictions()
    assert torch.equal(full.hidden, torch.stack([hidden[0, 0], hidden[0, 1], hidden[1, 0], hidden[1, 1]]))
    assert full.weight is head
    top = TopTargets(ids, ids.double()).of_predictions()
    assert torch.equal(top.ids, torch.stack([ids[0, 0], ids[0, 1], ids[1, 0], ids[1, 1]]))
    assert torch.equal(top.log_probs, top.ids.double())
