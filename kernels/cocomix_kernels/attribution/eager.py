"""Attribution in PyTorch: k sampled dots a token by batched products over sorted indices."""

import torch
from torch import Tensor

from cocomix_kernels.common.chunking import accumulation_dtype, row_chunks


def torch_attribution(values: Tensor, indices: Tensor, grad: Tensor, decoder: Tensor, label_topk: int) -> Tensor:
    """`concept_attribution` on any device."""
    n_tokens, k = indices.shape
    dtype = torch.promote_types(accumulation_dtype(decoder.dtype), accumulation_dtype(values.dtype))
    labels = indices.new_full((n_tokens, label_topk), -1, dtype=torch.int64)
    kept = min(k, label_topk)
    for rows in row_chunks(n_tokens, 2 * k * decoder.shape[1] * dtype.itemsize, values.device):
        ascending, order = indices[rows].long().sort(1)  # the stable sort below then breaks ties to the lowest index
        dots = torch.bmm(decoder[ascending].to(dtype), grad[rows, :, None].to(dtype))[:, :, 0]
        attribution = values[rows].to(dtype).gather(1, order) * dots
        best, position = attribution.sort(dim=1, descending=True, stable=True)
        labels[rows, :kept] = torch.where(best > 0, ascending.gather(1, position), -1)[:, :kept]
    return labels
