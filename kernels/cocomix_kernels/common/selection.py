"""Exact TopK over wide rows with a fixed order: larger value first, then lower index, NaN before everything.

The k groups of contiguous columns with the best (maximum, lowest index) always contain the k best elements: were an
element outside them among the k best, each of the k groups would hold an element that precedes it. So one cheap
pass takes group maxima, and the selection itself runs over k groups only.
"""

# Tensor.unflatten has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math

import torch
from torch import Tensor

_SMALLEST_GROUP = 4  # columns; below, keys for all columns cost less than another pass
_LOW = 0xFFFFFFFF  # the index sits in the key's lower half, complemented, so that lower indices win
_NEVER = torch.iinfo(torch.int64).min


def stable_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, as a stable descending sort gives them.

    logits [R, C] of any floating dtype -> values [R, k] (the same dtype, descending), indices [R, k] int64.
    """
    if logits.dtype == torch.float64:
        values, indices = torch.sort(logits, dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), indices[:, :k].contiguous()
    width = logits.shape[1]
    columns = torch.arange(width, device=logits.device)
    group = _group_width(width, k)
    if group < _SMALLEST_GROUP:
        indices = _topk_of_keys(_sort_keys(logits, columns), k)
    else:
        groups = _topk_of_keys(_sort_keys(_group_maxima(logits, group), columns[: -(-width // group)]), k)
        candidates = (groups[:, :, None] * group + columns[:group]).flatten(1)
        inside = candidates < width
        keys = _sort_keys(logits.gather(1, candidates.clamp(max=width - 1)), candidates)
        indices = _topk_of_keys(torch.where(inside, keys, _NEVER), k)
    return logits.gather(1, indices), indices


def _group_width(width: int, k: int) -> int:
    """The power of two at or below sqrt(C / k), where C / g maxima and k * g candidates are about as many."""
    return 1 << (math.isqrt(width // k).bit_length() - 1)


def _group_maxima(logits: Tensor, group: int) -> Tensor:  # [R, C] -> [R, ceil(C / group)]
    full = logits.shape[1] // group * group
    maxima = logits[:, :full].unflatten(1, (-1, group)).amax(-1)
    if full == logits.shape[1]:
        return maxima
    return torch.cat([maxima, logits[:, full:].amax(1, keepdim=True)], dim=1)


def _sort_keys(values: Tensor, indices: Tensor) -> Tensor:
    # int64 keys whose descending order is (value descending, index ascending)
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 turns -0 into +0, which is equal to it
    bits = torch.where(values.isnan(), torch.iinfo(torch.int32).max, bits)
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (monotone.long() << 32) | (_LOW - indices)


def _topk_of_keys(keys: Tensor, k: int) -> Tensor:
    return _LOW - (torch.topk(keys, k, dim=1).values & _LOW)
