"""Every kind of launch that dispatch can choose for `interleaved_attention`, at real widths."""

import torch

from cocomix_kernels import interleaved_attention
from cocomix_kernels.common.recording import recording

HEADS = 8
# (head size, dtype, T): whole blocks with both sizes of an element, and blocks that end early
CASES = [
    *((size, dtype, 1024) for size in (64, 128) for dtype in (torch.bfloat16, torch.float32)),
    *((size, torch.bfloat16, 129) for size in (64, 128)),
]


def launches(capability: tuple[int, int]):
    """Yield the launches that would run on a GPU of this compute capability, forward and backward."""
    with recording(capability) as recorded:
        for size, dtype, length in CASES:
            for concept_queries in (False, True):
                qkv = torch.zeros(1, 2 * length, 3 * HEADS * size, dtype=dtype, requires_grad=True)
                q, k, v = (t.unflatten(2, (HEADS, size)) for t in qkv.chunk(3, dim=2))
                if concept_queries:  # these come from a product of their own
                    q = torch.zeros(1, length, HEADS, size, dtype=dtype, requires_grad=True)
                interleaved_attention(q, k, v, backend="triton").sum().backward()
                yield from recorded
                recorded.clear()
