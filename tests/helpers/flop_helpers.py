"""PyTorch's flop counter, taught what it does not know or counts as if attention were not causal.

It does not look inside custom operations.
"""

import contextlib
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

import cocomix_kernels  # noqa: F401  registers the operations

aten = torch.ops.aten


def attention_flops(q, k, _v, *_, **__):
    """Two products; a causal call computes half of the square of scores."""
    batch, heads, queries, head = q
    return 2 * 2 * batch * heads * queries * k[2] * head // 2


def attention_backward_flops(_grad, q, k, *rest, **__):
    return 2 * attention_flops(q, k, None)


def concept_head_flops(x, weight, _bias, labels, _k, dx_wanted, dw_wanted, *_, **__):
    """Logits and, with labels, at once the loss's dx and dW."""
    return 2 * math.prod(x) * weight[0] * (1 + (labels is not None) * (dx_wanted + dw_wanted))


def concept_head_backward_flops(grad_values, _grad_loss, indices, x, *_, **__):
    """The gradient through the kept values touches k rows a token, for dx and for dW."""
    return 2 * 2 * math.prod(indices) * x[1]


def topk_linear_flops(x, weight, *_, **__):
    return 2 * math.prod(x) * weight[0]


def lm_head_losses_flops(x, weight, _labels, _ignored, hidden, _second, full, _weight, dx_wanted, dw_wanted, *_, **__):
    """Logits, at once the loss's dx and dW, and the teacher's logits where its whole distribution is asked for."""
    products = math.prod(x) * (1 + dx_wanted + dw_wanted) + (math.prod(hidden) if full else 0)
    return 2 * products * weight[0]


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    torch.ops.cocomix.concept_head: concept_head_flops,
    torch.ops.cocomix.concept_head_backward: concept_head_backward_flops,
    torch.ops.cocomix.lm_head_losses: lm_head_losses_flops,
    torch.ops.cocomix.topk_linear: topk_linear_flops,
}


class _NoModules(contextlib.nullcontext):
    """In place of the counter's tracker of modules, whose hooks fail where the gradient of a leaf is asked for."""

    parents = {"Global"}


def count_flops(function) -> tuple[int, set[str]]:
    """Floating-point operations of a call, and the operations that they were counted in."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _NoModules()
    with counter:
        function()
    return counter.get_total_flops(), {str(op) for ops in counter.get_flop_counts().values() for op in ops}
