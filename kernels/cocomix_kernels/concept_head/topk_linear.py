"""Linear layer + exact TopK, without [N, C] outputs: the encoder of a TopK sparse autoencoder.

Shapes: N tokens, d width, C latents, k kept latents. Forward is one product, a chunk of rows at a time; the backward
pass touches the kept rows only.
"""

# torch.library has no types for what it decorates.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import torch
from torch import Tensor

from cocomix_kernels.common.checks import check_k, check_same, check_shapes
from cocomix_kernels.common.chunking import accumulation_dtype
from cocomix_kernels.common.dispatch import choose_backend
from cocomix_kernels.concept_head.steps import backends, logit_chunks, steps


@torch.library.custom_op("cocomix::topk_linear", mutates_args=())
def _topk_linear(
    x: Tensor,  # [N, d]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [C]
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    values, indices = _outputs(x, weight, bias, k, backend)
    for rows, logits in logit_chunks(x, weight, bias, backend):
        steps(backend).topk(logits, k, values[rows], indices[rows])
    return values, indices


@_topk_linear.register_fake
def _outputs(x: Tensor, weight: Tensor, bias: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    return x.new_empty(n, k, dtype=accumulation_dtype(x.dtype)), x.new_empty(n, k, dtype=torch.int64)


@torch.library.custom_op("cocomix::topk_linear_backward", mutates_args=())
def _topk_linear_backward(
    grad_values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    x: Tensor,
    weight: Tensor,
    dx_wanted: bool,
    dw_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = dx_wanted, dw_wanted
    return steps(backend).linear_gradients(grad_values, indices, x, weight, None, None, wanted)


@_topk_linear_backward.register_fake
def _(
    grad_values: Tensor, indices: Tensor, x: Tensor, weight: Tensor, dx_wanted: bool, dw_wanted: bool, backend: str
) -> tuple[Tensor, ...]:
    shapes = (x.shape if dx_wanted else (0,), *((weight.shape, weight.shape[:1]) if dw_wanted else ((0,), (0,))))
    return tuple(x.new_empty(shape) for shape in shapes)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, _, ctx.backend = inputs
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices, x, weight)


def _backward(ctx: Any, grad_values: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = _topk_linear_backward(grad_values, *ctx.saved_tensors, wanted[0], wanted[1] or wanted[2], ctx.backend)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None


_topk_linear.register_autograd(_backward, setup_context=_setup_context)


def _run(backend: str, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _topk_linear(x, weight, bias, k, backend)


def topk_linear(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, *, relu: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest outputs of a linear layer, per row.

    x [N, d], weight [C, d], bias [C]: one floating dtype. Returns values [N, k] (descending; float32, float64 for
    float64 inputs) and indices [N, k] int64. The selection is exact on the outputs as stored in x's dtype, ties go
    to the lowest index; with `relu` the kept values are clamped at zero afterwards. Gradients reach x, weight and
    bias through the values.

    Source: "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), TopK activation. Raises `ValueError`
    for shapes, dtypes, devices or k that do not fit.
    """
    sizes = check_shapes("topk_linear", x=(x, "N d"), weight=(weight, "C d"), bias=(bias, "C"))
    check_same("topk_linear", x=x, weight=weight, bias=bias)
    check_k("topk_linear", k, sizes["C"])
    run = choose_backend("topk_linear", backends(_run, x.dtype, sizes["C"], k), backend, x.device)
    values, indices = run(x, weight, bias, k)
    return (values.relu() if relu else values), indices
