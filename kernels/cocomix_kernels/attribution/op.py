"""Concept labels: attribution of the teacher's loss to its active latents, by k sampled dot products a token.

Shapes: N tokens, d teacher width, C latents, k active latents, K labels.
"""

# torch.library has no types for what it decorates.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable

import torch
from torch import Tensor

from cocomix_kernels.attribution.eager import torch_attribution
from cocomix_kernels.common.checks import check_device, check_floats, check_integers, check_k, check_range, check_shapes
from cocomix_kernels.common.dispatch import choose_backend

_TRITON_LATENTS = 512  # its kernel sorts a token's attributions in the registers of one warp


@torch.library.custom_op("cocomix::concept_attribution", mutates_args=())
def _triton_backend(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    grad: Tensor,  # [N, d]
    decoder: Tensor,  # [C, d]
    label_topk: int,
) -> Tensor:
    from cocomix_kernels.attribution.triton_kernel import attribution_labels

    labels = _labels(values, indices, grad, decoder, label_topk)
    if label_topk > indices.shape[1]:
        labels.fill_(-1)
    attribution_labels(values, indices, grad, decoder, labels)
    return labels


@_triton_backend.register_fake
def _labels(values: Tensor, indices: Tensor, grad: Tensor, decoder: Tensor, label_topk: int) -> Tensor:
    return indices.new_empty(indices.shape[0], label_topk, dtype=torch.int64)


def _implementations(
    values: Tensor, indices: Tensor, grad: Tensor, decoder: Tensor
) -> dict[str, Callable[..., Tensor]]:
    if indices.shape[1] > _TRITON_LATENTS or torch.float64 in (values.dtype, grad.dtype, decoder.dtype):
        return {"torch": torch_attribution}
    return {"torch": torch_attribution, "triton": _triton_backend}


@torch.no_grad()
def concept_attribution(
    values: Tensor, indices: Tensor, grad: Tensor, decoder: Tensor, label_topk: int, *, backend: str | None = None
) -> Tensor:
    """The concepts with the largest strictly positive attribution s_i = a_i * <decoder_i, g>, largest first.

    values [N, k] active latents, indices [N, k] integers, grad [N, d] gradient of the teacher's loss with respect
    to the residual stream, decoder [C, d] with one row a concept (any floating dtypes; products accumulate in
    float32; no triton backend for float64 or more than 512 latents a token). Returns [N, label_topk] int64, -1 where
    fewer attributions are positive; ties go to the lowest index.

    Source: CoCoMix (arXiv 2502.08524), section 3: attribution. Raises `ValueError` for shapes, devices or indices
    that do not fit.
    """
    sizes = check_shapes(
        "concept_attribution",
        values=(values, "N k"),
        indices=(indices, "N k"),
        grad=(grad, "N d"),
        decoder=(decoder, "C d"),
    )
    check_floats("concept_attribution", values=values, grad=grad, decoder=decoder)
    check_integers("concept_attribution", indices=indices)
    check_device("concept_attribution", values=values, indices=indices, grad=grad, decoder=decoder)
    check_range("concept_attribution", "indices", indices, 0, sizes["C"])
    check_k("concept_attribution", label_topk, 65535, "label_topk")
    implementations = _implementations(values, indices, grad, decoder)
    run = choose_backend("concept_attribution", implementations, backend, values.device)
    return run(values, indices, grad, decoder, label_topk)
