"""Sparse products with the rows of a [C, d] matrix: k rows a token, gathered, dotted, or scattered into.

Shapes: N tokens, k kept concepts a token, P = N * k pairs of them, C concepts, d width.

Floating inputs are float32, bfloat16 or float16 in any mixture; everything is summed in float32, in an order that
does not change from run to run, without atomics and without asking the device for a number. P must stay below 2^31.

What is read is k rows a token, far more than what is written, so the kernels cut the width into slices and let the
slices be the slow axis of the grid: while one slice of all tokens is at work, C (or N) rows of 512 bytes are live,
16 MiB at C = 32768, which the second-level cache of an A100 or H100 holds whole.
"""

# Triton's language has types of its own, which checkers take for something else.
# pyright: basic

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cocomix_kernels.common.launch import ceil_div, launch, next_power_of_2

PIECE = 128  # pairs of one concept that one program adds at most, but for a concept's first piece (twice that)

# One warp reads 512 bytes of a row as 16 bytes a thread, and UNROLL such rows are under way before the first is used:
# 32 warps on a multiprocessor then have 128 KiB in flight, where memory speed needs about 20.
SLICE_BYTES = 512
UNROLL = 8

# One warp dots a token's row with this many rows at a time: eight keep 64 accumulators a thread and 8 to 16 loads of 16
# bytes under way. More warps a token would exchange the token's row through shared memory, behind barriers.
DOTS = 8

# The second kernel of a scatter adds partial rows in tiles, so that a concept that every token keeps (512 partial rows
# at N = 65536) takes 16 steps; a program looks for hot concepts among HOT_SLOTS slots, most of which have none.
HOT_ROWS, HOT_COLUMNS, HOT_SLOTS, HOT_WARPS = 32, 128, 16, 4


def slice_width(d: int, itemsize: int) -> int:
    """Columns that one warp takes of a row of d elements: 512 bytes, or a narrower row whole."""
    return min(next_power_of_2(d), SLICE_BYTES // itemsize)


def dot_rows(k: int) -> int:
    """Rows that `row_dots` takes at a time where there are k."""
    return min(next_power_of_2(k), DOTS)


@triton.jit
def load_row(pointers, columns, D: tl.constexpr, BLOCK: tl.constexpr):
    """A slice of a row in float32, 0 beyond the width D; unmasked where slices fit."""
    if D % BLOCK == 0:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=columns < D, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def store_row(pointers, row, columns, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store a slice of a row in the dtype that is pointed to."""
    if D % BLOCK == 0:
        tl.store(pointers, row.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, row.to(pointers.dtype.element_ty), mask=columns < D)


@triton.jit
def gathered_sum(
    values, indices, matrix, columns, D: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr
):
    """sum_j values[j] * matrix[indices[j]] over j < K, at `columns` [BLOCK], in float32."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, K // STEP * STEP, STEP):
        for step in tl.static_range(STEP):
            concept = tl.load(indices + start + step).to(tl.int64)
            value = tl.load(values + start + step).to(tl.float32)
            total += value * load_row(matrix + concept * D + columns, columns, D, BLOCK)
    for j in tl.static_range(K // STEP * STEP, K):
        concept = tl.load(indices + j).to(tl.int64)
        value = tl.load(values + j).to(tl.float32)
        total += value * load_row(matrix + concept * D + columns, columns, D, BLOCK)
    return total


@triton.jit
def row_dots(row, concepts, matrix, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """<row, matrix[concepts[j]]> for concepts [ROWS], in float32. Each must exist, also where its dot is not wanted."""
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    gathered = matrix + concepts.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        left = load_row(row + columns, columns, D, BLOCK)
        total += left * load_row(gathered + columns, columns, D, BLOCK)
    return tl.sum(total, axis=1)


@triton.jit
def add_base(total, base, scale):
    """scale * base + total; `base` is loaded already, `scale` points to one number or is None."""
    if scale is not None:
        base *= tl.load(scale).to(tl.float32)
    return base + total


@triton.jit
def _weighted_rows(
    values,
    indices,
    matrix,
    base,
    scale,
    out,
    base_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = gathered_sum(values + token * K, indices + token * K, matrix, columns, D, BLOCK, K, STEP)
    if base is not None:
        total = add_base(total, load_row(base + token * base_stride + columns, columns, D, BLOCK), scale)
    store_row(out + token * D + columns, total, columns, D, BLOCK)


@triton.jit
def _pair_sum(
    tokens, values, rows, row_stride, columns, start, stop, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """Sum of values[i] * rows[tokens[i]] at `columns`, and of values[i], over start <= i < stop."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    weight = 0.0
    for first in range(start, stop, STEP):
        part = tl.zeros([BLOCK], dtype=tl.float32)  # sums of sums: a long sum in one register would be less exact
        part_weight = 0.0
        for step in tl.static_range(STEP):
            inside = first + step < stop
            token = tl.load(tokens + first + step, mask=inside, other=0).to(tl.int64)
            value = tl.load(values + first + step, mask=inside, other=0.0).to(tl.float32)
            # `inside & (columns < D)`, of which Triton 3.9's interpreter makes no mask, since `inside` is a scalar.
            mask = tl.where(inside, columns, D) < D
            row = tl.load(rows + token * row_stride + columns, mask=mask, other=0.0)
            part += value * row.to(tl.float32)
            part_weight += value
        total += part
        weight += part_weight
    return total, weight


@triton.jit
def _write_concept(
    total, weight, concept, columns, base, base_sums, scale, out, row_sums, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the base to a finished row, and to its sum of values in the programs of the first slice; write both."""
    offset = concept.to(tl.int64) * D + columns
    if base is not None:
        total = add_base(total, load_row(base + offset, columns, D, BLOCK), scale)
    store_row(out + offset, total, columns, D, BLOCK)
    if row_sums is not None:
        if base_sums is not None:
            weight = add_base(weight, tl.load(base_sums + concept).to(tl.float32), scale)
        tl.store(row_sums + concept, weight.to(row_sums.dtype.element_ty), mask=tl.program_id(1) == 0)


@triton.jit
def _scatter_pieces(
    tokens,
    values,
    keys,
    starts,
    rows,
    base,
    base_sums,
    scale,
    out,
    row_sums,
    partial,
    partial_sums,
    n_concepts,
    row_stride,
    FIRST_KEY: tl.constexpr,
    LENGTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    # The sorted pairs are cut into chunks of LENGTH. Programs below n_concepts take a concept's first piece: up to the
    # end of the first whole chunk inside it. The others take one chunk each, where it belongs to a longer concept. So
    # a hot concept's pieces have the numbers of consecutive chunks, and those are their places among partial rows.
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_first = program < n_concepts
    chunk = program - n_concepts
    key = tl.load(keys + tl.maximum(chunk, 0) * LENGTH, mask=chunk >= 0, other=0).to(tl.int32)
    concept = tl.where(is_first, program, key - FIRST_KEY)
    start, end = tl.load(starts + concept), tl.load(starts + concept + 1)
    first_chunk = tl.cdiv(start, LENGTH)
    if is_first or chunk > first_chunk:
        slot = tl.where(is_first, first_chunk, chunk)
        begin = tl.where(is_first, start, slot * LENGTH)
        stop = tl.minimum(end, (slot + 1) * LENGTH)
        total, weight = _pair_sum(tokens, values, rows, row_stride, columns, begin, stop, D, BLOCK, STEP)
        if end <= (first_chunk + 1) * LENGTH:
            _write_concept(total, weight, concept, columns, base, base_sums, scale, out, row_sums, D, BLOCK)
        else:
            store_row(partial + slot.to(tl.int64) * D + columns, total, columns, D, BLOCK)
            tl.store(partial_sums + slot, weight, mask=tl.program_id(1) == 0)


@triton.jit
def _add_pieces(
    keys,
    starts,
    base,
    base_sums,
    scale,
    out,
    row_sums,
    partial,
    partial_sums,
    n_chunks,
    FIRST_KEY: tl.constexpr,
    LENGTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chunks = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    inside = chunks < n_chunks
    concepts = tl.load(keys + chunks * LENGTH, mask=inside, other=FIRST_KEY).to(tl.int32) - FIRST_KEY
    start, end = tl.load(starts + concepts), tl.load(starts + concepts + 1)
    leads = inside & (tl.cdiv(start, LENGTH) == chunks) & (end > (chunks + 1) * LENGTH)  # a hot concept's first piece
    chunk = tl.min(tl.where(leads, chunks, n_chunks), axis=0)
    while chunk < n_chunks:
        concept = tl.load(keys + chunk * LENGTH).to(tl.int32) - FIRST_KEY
        past = tl.cdiv(tl.load(starts + concept + 1), LENGTH)
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        weight = tl.zeros([ROWS], dtype=tl.float32)
        for first in range(chunk, past, ROWS):
            slots = first + tl.arange(0, ROWS)
            pointers = partial + slots.to(tl.int64)[:, None] * D + columns[None, :]
            total += tl.load(pointers, mask=(slots < past)[:, None] & (columns < D)[None, :], other=0.0)
            weight += tl.load(partial_sums + slots, mask=slots < past, other=0.0)
        _write_concept(
            tl.sum(total, axis=0),
            tl.sum(weight, axis=0),
            concept,
            columns,
            base,
            base_sums,
            scale,
            out,
            row_sums,
            D,
            BLOCK,
        )
        chunk = tl.min(tl.where(leads & (chunks > chunk), chunks, n_chunks), axis=0)


def with_contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [N, d] itself if its last dimension is contiguous, else a copy; any distance between rows is fine."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def weighted_rows(
    values: torch.Tensor,  # [N, k]
    indices: torch.Tensor,  # [N, k] int64 or int32
    matrix: torch.Tensor,  # [C, d]
    out: torch.Tensor,  # [N, d] contiguous
    base: torch.Tensor | None = None,  # [N, d]
    scale: torch.Tensor | None = None,  # scalar, on the device
) -> None:
    """out[n] = scale * base[n] + sum_j values[n, j] * matrix[indices[n, j]]; `out` may be `base`."""
    (n, k), d = indices.shape, matrix.shape[1]
    block = slice_width(d, matrix.itemsize)
    base = None if base is None else with_contiguous_rows(base)
    launch(
        _weighted_rows,
        (n, ceil_div(d, block)),
        values.contiguous(),
        indices.contiguous(),
        matrix.contiguous(),
        base,
        scale,
        out,
        0 if base is None else base.stride(0),
        D=d,
        BLOCK=block,
        K=k,
        STEP=UNROLL,
        num_warps=1,
        num_stages=1,
    )


class ConceptPlan(NamedTuple):
    """The pairs (token, concept) sorted by concept, made once by `plan_by_concept` and used by several scatters."""

    order: torch.Tensor  # [P] int64: place of each sorted pair in indices.flatten()
    tokens: torch.Tensor  # [P] int32: its token
    keys: torch.Tensor  # [P] int16 or int32: its concept + first_key
    starts: torch.Tensor  # [C + 1] int32: where each concept's pairs begin
    first_key: int

    @property
    def n_concepts(self) -> int:
        """C."""
        return self.starts.shape[0] - 1

    @property
    def n_chunks(self) -> int:
        """Chunks of `PIECE` sorted pairs, hence the rows of a scatter's partial buffer."""
        return ceil_div(self.order.shape[0], PIECE)


def plan_by_concept(indices: torch.Tensor, n_concepts: int) -> ConceptPlan:
    """Sort the pairs of indices [N, k] (integers below n_concepts) by concept; equal ones stay in their order."""
    pairs, k = indices.reshape(-1), indices.shape[1]
    # 16-bit keys take two passes of a radix sort where 64-bit ones take eight; the offset puts 65536 concepts in them.
    first_key, dtype = (-(2**15), torch.int16) if n_concepts <= 2**16 else (0, torch.int32)
    keys, order = torch.sort((pairs + first_key).to(dtype), stable=True)
    concepts = torch.arange(first_key, first_key + n_concepts, device=pairs.device, dtype=dtype)
    starts = torch.searchsorted(keys, concepts, out_int32=True)
    starts = torch.nn.functional.pad(starts, (0, 1), value=pairs.shape[0])
    return ConceptPlan(order, (order // k).to(torch.int32), keys, starts, first_key)


def plan_for_total(n: int, device: torch.device) -> ConceptPlan:
    """The plan of one concept that every one of n tokens keeps: a scatter with it is a weighted sum of all rows."""
    order = torch.arange(n, device=device)
    starts = torch.arange(2, device=device, dtype=torch.int32) * n
    return ConceptPlan(order, order.to(torch.int32), torch.zeros_like(order, dtype=torch.int16), starts, 0)


def scatter_rows(
    plan: ConceptPlan,
    values: torch.Tensor,  # [N, k]
    rows: torch.Tensor,  # [N, d], rows any distance apart
    out: torch.Tensor,  # [C, d] contiguous
    row_sums: torch.Tensor | None = None,  # [C] contiguous
    base: torch.Tensor | None = None,  # [C, d]
    base_sums: torch.Tensor | None = None,  # [C]
    scale: torch.Tensor | None = None,  # scalar, on the device
) -> None:
    """out[c] = scale * base[c] + sum of values[n, j] * rows[n] over the pairs with indices[n, j] == c.

    row_sums[c] = scale * base_sums[c] + sum of those values. Both are written in full, also where a concept has no
    pairs; `out` may be `base` and `row_sums` may be `base_sums`. A concept's pairs are added in the order of tokens:
    at most 2 * PIECE - 1 of them by one program, which writes the row; longer ones leave partial rows that a second
    kernel adds in their order. Each chunk of PIECE pairs has one partial row at most, so P / PIECE of them suffice.
    """
    d = out.shape[1]
    values = values.reshape(-1).index_select(0, plan.order)  # once here, instead of scattered reads in every slice
    rows = with_contiguous_rows(rows)
    base, base_sums = (None if t is None else t.contiguous() for t in (base, base_sums))
    partial, partial_sums = (
        torch.empty(s, dtype=torch.float32, device=out.device)
        for s in (
            (plan.n_chunks, d),
            (plan.n_chunks,),
        )
    )
    block = slice_width(d, rows.itemsize)
    launch(
        _scatter_pieces,
        (plan.n_concepts + plan.n_chunks, ceil_div(d, block)),
        plan.tokens,
        values,
        plan.keys,
        plan.starts,
        rows,
        base,
        base_sums,
        scale,
        out,
        row_sums,
        partial,
        partial_sums,
        plan.n_concepts,
        rows.stride(0),
        FIRST_KEY=plan.first_key,
        LENGTH=PIECE,
        D=d,
        BLOCK=block,
        STEP=UNROLL,
        num_warps=1,
        num_stages=1,
    )
    if plan.n_chunks > 1:
        columns = min(HOT_COLUMNS, next_power_of_2(d))
        launch(
            _add_pieces,
            (ceil_div(plan.n_chunks, HOT_SLOTS), ceil_div(d, columns)),
            plan.keys,
            plan.starts,
            base,
            base_sums,
            scale,
            out,
            row_sums,
            partial,
            partial_sums,
            plan.n_chunks,
            FIRST_KEY=plan.first_key,
            LENGTH=PIECE,
            D=d,
            BLOCK=columns,
            ROWS=HOT_ROWS,
            SLOTS=HOT_SLOTS,
            num_warps=HOT_WARPS,
            num_stages=1,
        )
