"""Causal attention over the doubled sequence, every query or concept queries only, forward and backward.

Shapes: B sequences, S = 2T keys, Q queries, H heads of size D <= 128. Layout [B, S, H, D] with any strides over the
first three dimensions. Query i sees keys 0 .. STEP * (i + 1) - 1: STEP = 1 is ordinary causal attention (Q = S),
STEP = 2 are concept queries (Q = T, query t sits at position 2t + 1). Tiles that every query of a block sees run in a
loop without a mask; only the STEP * BLOCK_M keys on a query block's diagonal are masked.

Arithmetic, in products of BLOCK_M x BLOCK_N x D a tile: forward 2, queries' gradient 3, keys' and values' gradient 4.
Backward, the scores and their gradient are computed twice (7 products, where 5 would do): atomic additions into dq
would make gradients differ from run to run, and a partial dq from every key block would be S / BLOCK_N times the size
of dq. A pass touches about S * (S + BLOCK) / 2 scores a head with every query and T * (T + BLOCK) with concept
queries, where BLOCK is its block of queries, or half its block of keys. At T = 1024 and the blocks chosen below,
concept queries take 0.50 to 0.53 of the arithmetic in each pass, 0.517 or less in all.

Products take bf16, fp16 or fp32 operands and accumulate in fp32; fp32 operands are multiplied exactly (no TF32), so on
the CUDA cores at a tenth of the speed or less. Row statistics are kept in base 2, in which exponentials are cheapest.
"""

# Triton's language has types of its own, which checkers take for something else.
# pyright: basic

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cocomix_kernels.common.launch import ceil_div, compute_capability, interpreted, launch, next_power_of_2


@triton.jit
def _tile(base, row, rows, STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to ROWS rows of a matrix [rows, D] from `row` on, and the mask of what lies inside it."""
    offsets, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(row, tl.int64) * STRIDE + (offsets[:, None] * STRIDE + columns[None, :])
    return pointers, (row + offsets < rows)[:, None] & (columns < D)[None, :]


@triton.jit
def _load_tile(
    base,
    row,
    rows,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[ROWS, BLOCK_D], zero outside the matrix; RAGGED: its rows may end inside the tile."""
    pointers, inside = _tile(base, row, rows, STRIDE, D, ROWS, BLOCK_D)  # pyright: ignore[reportGeneralTypeIssues]  Triton's own types
    if RAGGED:
        x = tl.load(pointers, mask=inside, other=0.0)
    elif D < BLOCK_D:
        x = tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def _store_tile(base, row, rows, x, STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, inside = _tile(base, row, rows, STRIDE, D, ROWS, BLOCK_D)  # pyright: ignore[reportGeneralTypeIssues]  Triton's own types
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, accumulator=None):
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _of_head(pointer, head, stride_b, stride_h, H: tl.constexpr):
    """Where the matrix of one of the B * H heads begins."""
    return pointer + (head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    limits,
    k_base,
    v_base,
    first,
    last,
    S,
    log2_scale,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Online softmax over the keys first .. last: each row's weighted values, sum and maximum."""
    for key in range(first, last, BLOCK_N):
        k = _load_tile(k_base, key, S, K_ROW, D, BLOCK_N, BLOCK_D, MASKED, INTERPRETED)
        scores = _dot(q, tl.trans(k))
        if MASKED:
            visible = (key + tl.arange(0, BLOCK_N))[None, :] < limits[:, None]
            scores = tl.where(visible, scores * log2_scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
            p = tl.exp2(scores * log2_scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = _load_tile(v_base, key, S, V_ROW, D, BLOCK_N, BLOCK_D, MASKED, INTERPRETED)
        acc = _dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    return acc, total, top


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [B, Q, H, D], [B, S, H, D] twice, [B, Q, H, D], [B, H, Q]
    q_sb,
    q_sh,
    k_sb,
    k_sh,
    v_sb,
    v_sh,
    Q,
    S,
    log2_scale,
    H: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATIVE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    blocks = tl.cdiv(Q, BLOCK_M)
    head = tl.program_id(0) // blocks
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # the longest first; a head's keys stay in the L2 cache
    q = _load_tile(_of_head(q_ptr, head, q_sb, q_sh, H), row, Q, Q_ROW, D, BLOCK_M, BLOCK_D, True, INTERPRETED)
    if NEGATIVE:  # a row's maximum may be scaled after it was taken only where the scale is positive
        q = -q
    k_base, v_base = _of_head(k_ptr, head, k_sb, k_sh, H), _of_head(v_ptr, head, v_sb, v_sh, H)
    rows = row + tl.arange(0, BLOCK_M)
    limits = STEP * (rows + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    diagonal = STEP * row
    acc, total, top = _attend(
        acc,
        total,
        top,
        q,
        limits,
        k_base,
        v_base,
        0,
        diagonal,
        S,
        log2_scale,
        K_ROW,
        V_ROW,
        D,
        BLOCK_D,
        BLOCK_N,
        False,
        INTERPRETED,
    )
    acc, total, top = _attend(
        acc,
        total,
        top,
        q,
        limits,
        k_base,
        v_base,
        diagonal,
        min(diagonal + STEP * BLOCK_M, S),
        S,
        log2_scale,
        K_ROW,
        V_ROW,
        D,
        BLOCK_D,
        BLOCK_N,
        True,
        INTERPRETED,
    )
    tl.store(lse_ptr + head.to(tl.int64) * Q + rows, top + tl.log2(total), mask=rows < Q)
    out_base = _of_head(out_ptr, head, tl.cast(Q, tl.int64) * (H * D), D, H)
    _store_tile(out_base, row, Q, acc / total[:, None], H * D, D, BLOCK_M, BLOCK_D)


@triton.jit
def _query_gradients(
    dq,
    q,
    grad,
    lse,
    delta,
    limits,
    k_base,
    v_base,
    first,
    last,
    S,
    log2_scale,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add what the keys first .. last give to a query block."""
    for key in range(first, last, BLOCK_N):
        k = _load_tile(k_base, key, S, K_ROW, D, BLOCK_N, BLOCK_D, MASKED, INTERPRETED)
        v = _load_tile(v_base, key, S, V_ROW, D, BLOCK_N, BLOCK_D, MASKED, INTERPRETED)
        p = tl.exp2(_dot(q, tl.trans(k)) * log2_scale - lse[:, None])
        if MASKED:
            p = tl.where((key + tl.arange(0, BLOCK_N))[None, :] < limits[:, None], p, 0.0)
        ds = p * (_dot(grad, tl.trans(v)) - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,  # lse, delta [B, H, Q]; writes delta and dq
    q_sb,
    q_sh,
    k_sb,
    k_sh,
    v_sb,
    v_sh,
    g_sb,
    g_sh,
    Q,
    S,
    scale,
    log2_scale,
    H: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    G_ROW: tl.constexpr,
    STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    blocks = tl.cdiv(Q, BLOCK_M)
    head = tl.program_id(0) // blocks
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    own_sb = tl.cast(Q, tl.int64) * (H * D)  # out and dq are contiguous
    out_base, dq_base = _of_head(out_ptr, head, own_sb, D, H), _of_head(dq_ptr, head, own_sb, D, H)
    grad = _load_tile(_of_head(grad_ptr, head, g_sb, g_sh, H), row, Q, G_ROW, D, BLOCK_M, BLOCK_D, True, INTERPRETED)
    out = _load_tile(out_base, row, Q, H * D, D, BLOCK_M, BLOCK_D, True, INTERPRETED)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    statistics = head.to(tl.int64) * Q + rows
    tl.store(delta_ptr + statistics, delta, mask=rows < Q)
    lse = tl.load(lse_ptr + statistics, mask=rows < Q, other=0.0)
    q = _load_tile(_of_head(q_ptr, head, q_sb, q_sh, H), row, Q, Q_ROW, D, BLOCK_M, BLOCK_D, True, INTERPRETED)
    k_base, v_base = _of_head(k_ptr, head, k_sb, k_sh, H), _of_head(v_ptr, head, v_sb, v_sh, H)
    limits = STEP * (rows + 1)
    diagonal = STEP * row
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _query_gradients(
        dq,
        q,
        grad,
        lse,
        delta,
        limits,
        k_base,
        v_base,
        0,
        diagonal,
        S,
        log2_scale,
        K_ROW,
        V_ROW,
        D,
        BLOCK_D,
        BLOCK_N,
        False,
        INTERPRETED,
    )
    dq = _query_gradients(
        dq,
        q,
        grad,
        lse,
        delta,
        limits,
        k_base,
        v_base,
        diagonal,
        min(diagonal + STEP * BLOCK_M, S),
        S,
        log2_scale,
        K_ROW,
        V_ROW,
        D,
        BLOCK_D,
        BLOCK_N,
        True,
        INTERPRETED,
    )
    _store_tile(dq_base, row, Q, dq * scale, H * D, D, BLOCK_M, BLOCK_D)


@triton.jit
def _key_gradients(
    dk,
    dv,
    k,
    v,
    keys,
    q_base,
    g_base,
    lse_base,
    delta_base,
    first,
    last,
    Q,
    log2_scale,
    Q_ROW: tl.constexpr,
    G_ROW: tl.constexpr,
    STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add what the queries first .. last give to a key block. Scores are transposed, [BLOCK_N, BLOCK_M], so that they
    are left operands of the products and never leave the registers."""
    for row in range(first, last, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        q = _load_tile(q_base, row, Q, Q_ROW, D, BLOCK_M, BLOCK_D, RAGGED, INTERPRETED)
        if RAGGED:  # rows beyond the end hold zeros in q and grad, so any finite statistic will do
            lse = tl.load(lse_base + rows, mask=rows < Q, other=0.0)
            delta = tl.load(delta_base + rows, mask=rows < Q, other=0.0)
        else:
            lse, delta = tl.load(lse_base + rows), tl.load(delta_base + rows)
        p = tl.exp2(_dot(k, tl.trans(q)) * log2_scale - lse[None, :])
        if MASKED:
            p = tl.where(keys[:, None] < STEP * (rows + 1)[None, :], p, 0.0)
        grad = _load_tile(g_base, row, Q, G_ROW, D, BLOCK_M, BLOCK_D, RAGGED, INTERPRETED)
        dv = _dot(p.to(grad.dtype), grad, dv)
        ds = p * (_dot(v, tl.trans(grad)) - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_sb,
    q_sh,
    k_sb,
    k_sh,
    v_sb,
    v_sh,
    g_sb,
    g_sh,
    Q,
    S,
    scale,
    log2_scale,
    H: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    G_ROW: tl.constexpr,
    STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_N)
    head = tl.program_id(0) // blocks
    key = tl.program_id(0) % blocks * BLOCK_N  # all queries see the first block: the longest first
    k = _load_tile(_of_head(k_ptr, head, k_sb, k_sh, H), key, S, K_ROW, D, BLOCK_N, BLOCK_D, True, INTERPRETED)
    v = _load_tile(_of_head(v_ptr, head, v_sb, v_sh, H), key, S, V_ROW, D, BLOCK_N, BLOCK_D, True, INTERPRETED)
    keys = key + tl.arange(0, BLOCK_N)
    q_base, g_base = _of_head(q_ptr, head, q_sb, q_sh, H), _of_head(grad_ptr, head, g_sb, g_sh, H)
    lse_base, delta_base = lse_ptr + head.to(tl.int64) * Q, delta_ptr + head.to(tl.int64) * Q
    first = key // STEP  # the first query that sees any of these keys; from BLOCK_N / STEP later on they see all
    seen = min(first + max(BLOCK_N // STEP, BLOCK_M), Q)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _key_gradients(
        dk,
        dv,
        k,
        v,
        keys,
        q_base,
        g_base,
        lse_base,
        delta_base,
        first,
        seen,
        Q,
        log2_scale,
        Q_ROW,
        G_ROW,
        STEP,
        D,
        BLOCK_D,
        BLOCK_M,
        True,
        RAGGED,
        INTERPRETED,
    )
    dk, dv = _key_gradients(
        dk,
        dv,
        k,
        v,
        keys,
        q_base,
        g_base,
        lse_base,
        delta_base,
        seen,
        Q,
        Q,
        log2_scale,
        Q_ROW,
        G_ROW,
        STEP,
        D,
        BLOCK_D,
        BLOCK_M,
        False,
        RAGGED,
        INTERPRETED,
    )
    own_sb = tl.cast(S, tl.int64) * (H * D)
    _store_tile(_of_head(dk_ptr, head, own_sb, D, H), key, S, dk * scale, H * D, D, BLOCK_N, BLOCK_D)
    _store_tile(_of_head(dv_ptr, head, own_sb, D, H), key, S, dv, H * D, D, BLOCK_N, BLOCK_D)


FORWARD, QUERIES, KEYS = "forward", "queries", "keys"

# (pass, head size up to, bytes an element) -> BLOCK_M, BLOCK_N, warps, stages; the same for both forms, so that they
# differ by their arithmetic alone. None was timed: each is a large tile that compiles without spilling a register for
# both forms, with whole and with ragged blocks, by Triton 3.6 and 3.7. Where registers allow, two blocks share an SM
# (one's exponentials then run beside another's products), and tiles have the 64 columns with which shared memory feeds
# wgmma at its rate. The forward pass takes 128 queries a block, because 64 would be bound by the L2 cache.
_EXACT = {  # fp32 is multiplied on the CUDA cores, whose operands live in registers: tiles are what these hold
    (FORWARD, 64, 4): (64, 32, 8, 2),
    (QUERIES, 64, 4): (64, 32, 8, 2),
    (KEYS, 64, 4): (32, 32, 8, 1),
    (FORWARD, 128, 4): (32, 16, 8, 1),
    (QUERIES, 128, 4): (32, 16, 8, 2),
    (KEYS, 128, 4): (32, 16, 8, 1),
}
CONFIGURATIONS = {
    8: _EXACT
    | {  # mma.sync holds its operands in registers as well; at most 80 KiB, so that smaller chips run it too
        (FORWARD, 64, 2): (128, 64, 8, 3),
        (QUERIES, 64, 2): (64, 64, 4, 3),
        (KEYS, 64, 2): (32, 128, 8, 3),
        (FORWARD, 128, 2): (128, 32, 8, 3),
        (QUERIES, 128, 2): (128, 32, 8, 2),
        (KEYS, 128, 2): (32, 64, 8, 2),
    },
    9: _EXACT
    | {  # wgmma reads operands from shared memory; at D = 128 dk and dv fill half the registers
        (FORWARD, 64, 2): (128, 64, 8, 3),
        (QUERIES, 64, 2): (64, 64, 4, 3),
        (KEYS, 64, 2): (64, 128, 8, 2),
        (FORWARD, 128, 2): (128, 64, 8, 3),
        (QUERIES, 128, 2): (128, 64, 8, 2),
        (KEYS, 128, 2): (32, 128, 8, 2),
    },
    10: _EXACT
    | {  # accumulators live in tensor memory, whose instructions are made for 128 rows
        (FORWARD, 64, 2): (128, 128, 8, 2),
        (QUERIES, 64, 2): (128, 64, 4, 3),
        (KEYS, 64, 2): (64, 128, 8, 2),
        (FORWARD, 128, 2): (128, 64, 8, 3),
        (QUERIES, 128, 2): (128, 64, 4, 2),
        (KEYS, 128, 2): (64, 128, 8, 2),
    },
}


def _configuration(which: str, head_size: int, itemsize: int, capability: tuple[int, int]) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps and stages; a chip without an entry of its own gets the most frugal one."""
    table = CONFIGURATIONS.get(capability[0], CONFIGURATIONS[8])
    return table[which, 64 if head_size <= 64 else 128, itemsize]


def _options(which: str, **matrices: Tensor) -> dict[str, Any]:
    """What a pass is launched with: constants of the shapes, row strides, and its configuration."""
    q, k = matrices["Q"], matrices["K"]
    block_m, block_n, warps, stages = _configuration(which, q.shape[3], q.element_size(), compute_capability(q.device))
    return {
        "H": q.shape[2], "D": q.shape[3], "BLOCK_D": max(16, next_power_of_2(q.shape[3])),
        "STEP": 1 if q.shape[1] == k.shape[1] else 2, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "INTERPRETED": interpreted(_forward), "num_warps": warps, "num_stages": stages,
        **{f"{name}_ROW": t.stride(1) for name, t in matrices.items()},
    }  # fmt: skip


def _dense_heads(*tensors: Tensor) -> list[Tensor]:
    """The kernels take strides over sequences, positions and heads; within a head the elements must be adjacent."""
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    """Over sequences and over heads."""
    return [t.stride(dimension) for t in tensors for dimension in (0, 2)]


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """q [B, Q, H, D], k, v [B, S, H, D] -> out like q, and the base-2 log-sum-exp of the scaled scores [B, H, Q].

    out and lse are written in full and must be contiguous.
    """
    (batch, n_queries, n_heads, _), n_keys = q.shape, k.shape[1]
    q, k, v = _dense_heads(q, k, v)
    options = _options(FORWARD, Q=q, K=k, V=v)
    launch(
        _forward, (batch * n_heads * ceil_div(n_queries, options["BLOCK_M"]),), q, k, v, out, lse,
        *_strides(q, k, v), n_queries, n_keys, abs(scale) * math.log2(math.e), NEGATIVE=scale < 0, **options,
    )  # fmt: skip


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """The gradients of q, k and v, which are written in full and must be contiguous.

    grad is like q; out and lse are those of `attention_forward`.
    """
    (batch, n_queries, n_heads, _), n_keys = q.shape, k.shape[1]
    q, k, v, grad = _dense_heads(q, k, v, grad)
    delta = torch.empty_like(lse)
    numbers = *_strides(q, k, v, grad), n_queries, n_keys, scale, scale * math.log2(math.e)
    options = _options(QUERIES, Q=q, K=k, V=v, G=grad)
    launch(
        _backward_queries, (batch * n_heads * ceil_div(n_queries, options["BLOCK_M"]),),
        q, k, v, out, grad, lse, delta, dq, *numbers, **options,
    )  # fmt: skip
    options = _options(KEYS, Q=q, K=k, V=v, G=grad)
    first_query_step = options["BLOCK_N"] // options["STEP"]  # where a key block's loops start is a multiple of it
    launch(
        _backward_keys, (batch * n_heads * ceil_div(n_keys, options["BLOCK_N"]),),
        q, k, v, grad, lse, delta, dk, dv, *numbers,
        RAGGED=any(size % options["BLOCK_M"] for size in (n_queries, first_query_step)), **options,
    )  # fmt: skip
