"""What `concept_head` and `topk_linear` share: the product a chunk at a time, and the sparse part of its gradient."""

import torch

from cocomix.kernels.chunking import accumulation_dtype, row_chunks


def logit_chunks(x, weight, bias):
    """Yield (rows, logits) for x [N, d], weight [C, d], bias [C]: logits [R, C] in x's dtype, in a reused buffer.

    A consumer may overwrite the logits. Where x has a lower precision than sums have, the chunk's budget leaves room
    for one copy in each.
    """
    width = weight.shape[0]
    itemsize = accumulation_dtype(x.dtype).itemsize
    bytes_per_logit = itemsize if x.dtype.itemsize == itemsize else itemsize + 2 * x.dtype.itemsize
    chunks = row_chunks(x.shape[0], width * bytes_per_logit, x.device)
    buffer = x.new_empty(chunks[0].stop if chunks else 0, width)
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        torch.addmm(bias, x[rows], weight.t(), out=logits)
        yield rows, logits


def sparse_linear_gradients(grad_values, indices, x, weight, dx, dw, db):
    """Add the gradient that reaches a linear layer through k kept outputs per row.

    grad_values [N, k], indices [N, k], x [N, d], weight [C, d]; adds into dx [N, d], dw [C, d], db [C] in place
    (dx or dw and db may be None). Never touches more than the kept rows.
    """
    n_kept, width = indices.shape[1], x.shape[1]
    for rows in row_chunks(x.shape[0], 2 * n_kept * width * accumulation_dtype(x.dtype).itemsize, x.device):
        g, kept = grad_values[rows], indices[rows]
        if dx is not None:
            dx[rows] += torch.bmm(g[:, None, :].to(dx.dtype), weight[kept].to(dx.dtype))[:, 0]
        if dw is not None:
            dw.index_add_(0, kept.flatten(), (g[:, :, None].to(dw.dtype) * x[rows, None, :]).flatten(0, 1))
            db.index_add_(0, kept.flatten(), g.flatten().to(db.dtype))
