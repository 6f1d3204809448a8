"""Every launch that dispatch can choose for sparse products, attribution and concept mixing at real widths."""

from functools import partial

import torch

from cocomix_kernels import concept_add, concept_attribution, concept_mix
from cocomix_kernels.common import sparse_rows as sparse
from cocomix_kernels.common.recording import recording

CONCEPTS = 1024  # how many there are changes no binary
BF16, FP32 = torch.bfloat16, torch.float32
# (d, k, dtype): the paper's widths and the teacher's, another way to step through k, and both sizes of an element
SHAPES = [(512, 32, BF16), (768, 32, BF16), (1024, 32, BF16), (2048, 32, BF16), (1024, 5, BF16), (768, 32, FP32)]


def _tokens(n, d, k, dtype):
    """values [n, k], indices [n, k], rows [n, d] and a matrix of CONCEPTS rows."""
    rows, matrix = (torch.zeros(size, d, dtype=dtype) for size in (n, CONCEPTS))
    return torch.zeros(n, k), torch.randint(CONCEPTS, (n, k)), rows, matrix


def _products(d, k, dtype):
    n = 1 + 128 // k  # more pairs than a chunk has, hence also the kernel that adds partial rows
    values, indices, rows, matrix = _tokens(n, d, k, dtype)
    plan = sparse.plan_by_concept(indices, CONCEPTS)
    dx, dw, db = (torch.empty(shape, dtype=dtype) for shape in (rows.shape, matrix.shape, (CONCEPTS,)))
    of_loss = dx, torch.empty(matrix.shape), torch.empty(CONCEPTS)
    for bases, scale in (((None, None, None), None), (of_loss, torch.ones(()))):
        sparse.weighted_rows(values, indices, matrix, dx, bases[0], scale)
        sparse.scatter_rows(plan, values, rows, dw, db, *bases[1:], scale)


def _attribution(d, k, dtype):
    values, indices, grad, decoder = _tokens(2, d, k, dtype)
    concept_attribution(values, indices, grad, decoder, 4, backend="triton")


def _mixing(d, k, dtype):
    values, indices, hidden, weight = (t[None] for t in _tokens(1 + 128 // k, d, k, dtype))
    statistics = torch.ones(2, *hidden.shape[:2], 1)
    inputs = [hidden, values, indices, weight[0], *torch.zeros(2, d, dtype=dtype), *statistics]
    for wanted in ((0, 1, 3, 4, 5, 6, 7), (1,), (6, 7)):  # all, and what a frozen neighbour leaves
        for operation in (concept_mix, partial(concept_mix, residual=True), concept_add):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
            operation(*leaves, backend="triton").sum().backward()


def launches(capability: tuple[int, int]):
    """Yield the launches that would run on a GPU of this compute capability."""
    with recording(capability) as recorded:
        for d, k, dtype in SHAPES:
            for family in (_products, _attribution, _mixing):
                family(d, k, dtype)
                yield from recorded
                recorded.clear()
