"""Every kind of launch that dispatch can choose for `concept_head` and `topk_linear`, at real widths."""

import torch

from cocomix_kernels import concept_head, topk_linear
from cocomix_kernels.common.recording import recording

TOKENS, WIDTH = 4, 64  # the width plays no part in these kernels
# (dtype, C, k): keys of 32 and of 64 bits, one warp a row and several, and networks of every size class
SHAPES = [
    *((torch.bfloat16, 32768, k) for k in (1, 32, 256)),
    (torch.float32, 32768, 32),
    (torch.bfloat16, 131072, 32),
]


def launches(capability: tuple[int, int]):
    """Yield the launches that would run on a GPU of this compute capability."""
    with recording(capability) as recorded:
        for dtype, n_concepts, k in SHAPES:
            x, weight, bias = (torch.zeros(s, dtype=dtype) for s in ((TOKENS, WIDTH), (n_concepts, WIDTH), n_concepts))
            labels = torch.zeros(TOKENS, 4, dtype=torch.int64)
            topk_linear(x, weight, bias, k, backend="triton")
            concept_head(x.requires_grad_(), weight, bias, k, labels, backend="triton")
            yield from recorded
            recorded.clear()
