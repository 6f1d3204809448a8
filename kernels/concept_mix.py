"""Sparse projection of the kept concept logits, de-normalisation, and interleaving with the hidden states.

Shapes: B sequences of T tokens, d width, C concepts, k kept concepts.
"""

import torch
import torch.nn.functional as F

from cocomix.kernels.checks import (
    check_device,
    check_floats,
    check_integers,
    check_range,
    check_same,
    check_shapes,
)
from cocomix.kernels.chunking import accumulation_dtype, row_chunks
from cocomix.kernels.dispatch import choose_backend


class _WeightedRows(torch.autograd.Function):
    """sum_j values[n, j] * weight[indices[n, j]] from low-precision rows, in float32, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx, values, indices, weight):  # [N, k], [N, k], [C, d] -> [N, d] float32
        ctx.save_for_backward(values, indices, weight)
        out = values.new_empty(values.shape[0], weight.shape[1], dtype=torch.float32)
        for rows in _gather_chunks(indices, weight):
            out[rows] = torch.bmm(values[rows, None, :].float(), weight[indices[rows]].float())[:, 0]
        return out

    @staticmethod
    def backward(ctx, grad):
        values, indices, weight = ctx.saved_tensors
        dvalues, dweight = torch.empty_like(values), torch.zeros_like(weight, dtype=torch.float32)
        for rows in _gather_chunks(indices, weight):
            g, kept = grad[rows].float(), indices[rows]
            dvalues[rows] = torch.bmm(weight[kept].float(), g[:, :, None])[:, :, 0].to(values.dtype)
            dweight.index_add_(0, kept.flatten(), (values[rows, :, None].float() * g[:, None, :]).flatten(0, 1))
        return dvalues, None, dweight.to(weight.dtype)


def _gather_chunks(indices, weight):
    return row_chunks(indices.shape[0], 3 * indices.shape[1] * weight.shape[1] * 4, weight.device)


def _weighted_rows(values, indices, weight):  # [N, k], [N, k], [C, d] -> [N, d]
    if weight.dtype == values.dtype:  # float32 or float64, where the library's kernel keeps full precision
        return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")
    return _WeightedRows.apply(values, indices, weight)


def concept_vectors(values, indices, weight, bias, pre_bias, mean, std):
    """The continuous concepts c = (sum_j v_j W[i_j] + b + pre_bias) * std + mean.

    Shapes as in `concept_mix`; returns [B, T, d] in the accumulation dtype.
    """
    batch, length, _ = values.shape
    kept = values.flatten(0, 1).to(accumulation_dtype(weight.dtype))
    rows = _weighted_rows(kept, indices.flatten(0, 1).long(), weight).view(batch, length, weight.shape[1])
    return (rows + (bias + pre_bias)) * std + mean


def _torch_backend(hidden, values, indices, weight, bias, pre_bias, mean, std):
    concepts = concept_vectors(values, indices, weight, bias, pre_bias, mean, std)
    return torch.stack([hidden, concepts.to(hidden.dtype)], dim=2).flatten(1, 2)


def concept_mix(hidden, values, indices, weight, bias, pre_bias, mean, std, *, backend=None) -> torch.Tensor:
    """Compress the kept concepts into one vector a token and interleave it: h_0, c_0, h_1, c_1, ...

    hidden [B, T, d]; values, indices [B, T, k]; weight [C, d] with one row a concept; bias, pre_bias [d];
    mean, std [B, T, 1]. Returns [B, 2T, d] in hidden's dtype: even rows are hidden, odd rows
    c = (sum_j v_j W[i_j] + bias + pre_bias) * std + mean. hidden, weight and the biases share a dtype; values, mean
    and std may have a higher one. Sums are in float32 (float64 for float64). Gradients reach every floating-point
    input.

    Source: CoCoMix (arXiv 2502.08524), section 3: mixing and interleaving. Raises `ValueError` for shapes, dtypes,
    devices or indices that do not fit.
    """
    sizes = check_shapes(
        "concept_mix", hidden=(hidden, "B T d"), values=(values, "B T k"), indices=(indices, "B T k"),
        weight=(weight, "C d"), bias=(bias, "d"), pre_bias=(pre_bias, "d"), mean=(mean, "B T 1"), std=(std, "B T 1"),
    )
    check_same("concept_mix", hidden=hidden, weight=weight, bias=bias, pre_bias=pre_bias)
    check_floats("concept_mix", values=values, mean=mean, std=std)
    check_integers("concept_mix", indices=indices)
    check_device("concept_mix", hidden=hidden, values=values, indices=indices, mean=mean, std=std)
    check_range("concept_mix", "indices", indices, 0, sizes["C"])
    run = choose_backend("concept_mix", {"torch": _torch_backend}, backend, hidden.device)
    return run(hidden, values, indices, weight, bias, pre_bias, mean, std)
