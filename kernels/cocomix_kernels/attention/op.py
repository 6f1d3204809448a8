"""Causal attention over the doubled sequence, and its concept-query form for the last block.

Shapes: B sequences, T tokens, S = 2T positions, H heads of size D. Layout [B, S, H, D], as the QKV product leaves it.

A concept query t sits at position 2t + 1 and sees the hidden states 0..t and the concepts 0..t: over the even keys
and over the odd keys alike that is an ordinary causal problem of T queries and T keys. So two calls of a library's
causal kernel, merged by their log-sum-exps, do exactly the work that is needed, without a mask. So a CPU runs them;
for GPUs there is a Triton kernel of our own. Every query is plain causal attention, for which libraries are tuned.
"""

# torch.library has no types for what it decorates.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import functools
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cocomix_kernels.attention.eager import torch_attention, torch_causal
from cocomix_kernels.common.checks import check_same, check_shapes
from cocomix_kernels.common.dispatch import choose_backend


def _cudnn_causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch_causal(q, k, v, scale)


@torch.library.custom_op("cocomix::interleaved_attention", mutates_args=())
def _attention(
    q: Tensor,  # [B, 2T or T, H, D]
    k: Tensor,  # [B, 2T, H, D]
    v: Tensor,  # [B, 2T, H, D]
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exps that the same backend's backward pass wants."""
    if backend == "flash_attn_4":
        from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]  an optional library

        out, lse = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=True, return_lse=True)[:2]
        return out, lse.contiguous()
    from cocomix_kernels.attention.triton_kernel import attention_forward

    out, lse = _outputs(q, k, v, scale, backend)
    attention_forward(q, k, v, scale, out, lse)
    return out, lse


@_attention.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    batch, n_queries, n_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, n_heads, n_queries, dtype=torch.float32)


@torch.library.custom_op("cocomix::interleaved_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,  # like out
    q: Tensor,  # [B, 2T or T, H, D]
    k: Tensor,  # [B, 2T, H, D]
    v: Tensor,  # [B, 2T, H, D]
    out: Tensor,  # like q
    lse: Tensor,  # [B, H, 2T or T]
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "flash_attn_4":
        from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]  an optional library

        deterministic = torch.are_deterministic_algorithms_enabled()
        gradients = _flash_attn_bwd(
            q, k, v, out, grad, lse, softmax_scale=scale, causal=True, deterministic=deterministic
        )
        return tuple(g.contiguous() for g in gradients[:3])
    from cocomix_kernels.attention.triton_kernel import attention_backward

    gradients = _gradients(grad, q, k, v, out, lse, scale, backend)
    attention_backward(grad, q, k, v, out, lse, scale, *gradients)
    return gradients


@_attention_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _own_op(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return _attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, backend)[0]


_triton_backend, _flash_4 = partial(_own_op, "triton"), partial(_own_op, "flash_attn_4")


def _flash_2(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]  an optional library

    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=deterministic)


@functools.cache
def _flash_versions() -> list[int]:
    """The versions of flash_attn that can be imported, the newest first."""
    found: list[int] = []
    candidates = (4, "flash_attn.cute.interface", "_flash_attn_bwd"), (2, "flash_attn", "flash_attn_func")
    for version, module, name in candidates:
        try:
            if hasattr(importlib.import_module(module), name):  # version 4 alone leaves flash_attn without functions
                found.append(version)
        except ImportError:
            continue
    return found


@torch.compiler.assume_constant_result
def _flash_version(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The version of flash_attn that computes this, "4" or "2", or "" where none does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return ""
    major = torch.cuda.get_device_capability(device)[0]
    fits = {4: major in (9, 10) and head_size in (64, 96, 128), 2: major >= 8 and head_size <= 256}
    return next((str(version) for version in _flash_versions() if fits[version]), "")


def _flash_backend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    version = _flash_version(q.device, q.dtype, q.shape[-1])
    if not version:
        raise ValueError(
            f"interleaved_attention: no flash_attn is installed that takes {q.dtype} and heads of {q.shape[-1]} on "
            "this GPU; use another backend"
        )
    return (_flash_4 if version == "4" else _flash_2)(q, k, v, scale)


def _default(q: Tensor, concept_queries: bool) -> str:
    """The rule by which a backend is chosen, not yet backed by measurements of ours on a GPU."""
    if q.device.type != "cuda":
        return "torch"
    if concept_queries:
        return "triton"  # the one without a mask tensor and without the work that a mask would discard
    if _flash_version(q.device, q.dtype, q.shape[-1]):
        return "flash"
    return "torch"  # plain causal attention is what PyTorch's library kernels are tuned for


def _implementations(q: Tensor, concept_queries: bool) -> dict[str, Callable[..., Tensor]]:
    found = {"torch": torch_attention}
    if q.dtype in (torch.bfloat16, torch.float16, torch.float32) and q.shape[-1] <= 128:
        found["triton"] = _triton_backend
    if not concept_queries:
        found |= {"flash": _flash_backend, "cudnn": _cudnn_causal}
    return found


def interleaved_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention over interleaved hidden states (even positions) and concepts (odd positions).

    k, v [B, S, H, D]. q [B, S, H, D]: ordinary causal attention -> [B, S, H, D]. q [B, T, H, D] with S = 2T: concept
    queries, row t sits at position 2t + 1 and sees positions 0..2t+1 -> [B, T, H, D]. One floating dtype; `scale`
    defaults to 1/sqrt(D). Gradients reach q, k and v.

    Backends: "torch" (scaled_dot_product_attention as PyTorch chooses); "triton" (not for float64 or D > 128;
    deterministic); for every query also "flash" (flash_attn 4 or 2, where installed) and "cudnn"
    (scaled_dot_product_attention by cuDNN alone). None: on CUDA concept queries run with triton and every query with
    flash where it is installed and takes the inputs, else with torch; elsewhere both run with torch.

    Source: CoCoMix (arXiv 2502.08524), section 3: interleaving; only concept positions are read after the last
    block, so its queries are needed there alone. Raises `ValueError` for shapes, dtypes or devices that do not fit.
    """
    sizes = check_shapes("interleaved_attention", k=(k, "B S H D"), v=(v, "B S H D"))
    check_same("interleaved_attention", q=q, k=k, v=v)
    length = sizes["S"] if q.dim() == 4 and q.shape[1] == sizes["S"] else sizes["S"] // 2
    if length < sizes["S"] and sizes["S"] % 2:
        raise ValueError(f"interleaved_attention: k has {sizes['S']} positions, expected an even number (2T)")
    check_shapes("interleaved_attention", k=(k, "B S H D"), q=(q, f"B {length} H D"))
    concept_queries = length < sizes["S"]
    name = "interleaved_attention" + " of concept queries" * concept_queries
    default = _default(q, concept_queries) if backend is None else None
    run = choose_backend(name, _implementations(q, concept_queries), backend, q.device, default)
    return run(q, k, v, scale)
