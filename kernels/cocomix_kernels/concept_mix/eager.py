"""Concept mixing in PyTorch.

Shapes: B sequences of T tokens, N = B * T, d width, C concepts, k kept concepts.
"""

# torch.autograd.Function has no types for what it applies.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocomix_kernels.common.chunking import accumulation_dtype, row_chunks


class _WeightedRows(torch.autograd.Function):
    """sum_j values[n, j] * weight[indices[n, j]] from low-precision rows, in float32, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        # [N, k], [N, k], [C, d] -> [N, d] float32
        ctx.save_for_backward(values, indices, weight)
        out = values.new_empty(values.shape[0], weight.shape[1], dtype=torch.float32)
        for rows in _gather_chunks(indices, weight):
            out[rows] = torch.bmm(values[rows, None, :].float(), weight[indices[rows]].float())[:, 0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        (grad,) = grads
        values, indices, weight = ctx.saved_tensors
        dvalues, dweight = torch.empty_like(values), torch.zeros_like(weight, dtype=torch.float32)
        for rows in _gather_chunks(indices, weight):
            g, kept = grad[rows].float(), indices[rows]
            dvalues[rows] = torch.bmm(weight[kept].float(), g[:, :, None])[:, :, 0].to(values.dtype)
            dweight.index_add_(0, kept.flatten(), (values[rows, :, None].float() * g[:, None, :]).flatten(0, 1))
        return dvalues, None, dweight.to(weight.dtype)


def _gather_chunks(indices: Tensor, weight: Tensor) -> list[slice]:
    return row_chunks(indices.shape[0], 3 * indices.shape[1] * weight.shape[1] * 4, weight.device)


def _weighted_rows(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:  # [N, k], [N, k], [C, d] -> [N, d]
    if weight.dtype == values.dtype:  # float32 or float64, where the library's kernel keeps full precision
        return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")
    return _WeightedRows.apply(values, indices, weight)


def concept_vectors(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    """The continuous concepts c = (sum_j v_j W[i_j] + b + pre_bias) * std + mean.

    Shapes as in `concept_mix`; returns [B, T, d] in the accumulation dtype.
    """
    return _scaled_rows(values, indices, weight, bias, pre_bias, std) + mean


def _scaled_rows(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor, std: Tensor
) -> Tensor:
    """c - mean, [B, T, d]."""
    batch, length, _ = values.shape
    kept = values.flatten(0, 1).to(accumulation_dtype(weight.dtype))
    rows = _weighted_rows(kept, indices.flatten(0, 1).long(), weight).view(batch, length, weight.shape[1])
    return (rows + (bias + pre_bias)) * std


def torch_mix(hidden: Tensor, *of_concepts: Tensor) -> Tensor:
    """hidden [B, T, d] and what `concept_vectors` takes -> [B, 2T, d], interleaved."""
    return _interleaved(hidden, concept_vectors(*of_concepts))


def torch_mix_residual(
    hidden: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    _mean: Tensor,
    std: Tensor,
) -> Tensor:
    """As `torch_mix`, with hidden + c - mean at the concept positions."""
    return _interleaved(hidden, hidden + _scaled_rows(values, indices, weight, bias, pre_bias, std))


def _interleaved(hidden: Tensor, concepts: Tensor) -> Tensor:
    return torch.stack([hidden, concepts.to(hidden.dtype)], dim=2).flatten(1, 2)


def torch_add(hidden: Tensor, *of_concepts: Tensor) -> Tensor:
    """hidden [B, T, d] and what `concept_vectors` takes -> [B, T, d], added."""
    return hidden + concept_vectors(*of_concepts).to(hidden.dtype)
