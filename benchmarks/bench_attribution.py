"""`concept_attribution` against the public code's two dense [N, C] matrices, and its bytes at copy speed.

    pytest benchmarks/bench_attribution.py [--full] [--benchmark-json FILE]

The public way gets its dense latents as an input: making them is the encoder's benchmark. The bytes count a decoder
row for each of a token's k latents, as if no cache held any; the rows together may fit a large L2, and then the ratio
to the floor can be below one.

Shapes: N tokens, d teacher width, C latents, k active, K labels.
"""

from types import SimpleNamespace

import public_way
import torch
from harness import (
    TOLERANCE,
    WIDER,
    Case,
    Setting,
    copy_floor,
    distinct_indices,
    relative_error,
    sampled,
)
from summary import FLOOR, PUBLIC, Target

from cocomix_kernels import concept_attribution

BYTES = "N k d s of decoder rows + N d s of gradients + N k (s_values + 8) + 8 N K; s bytes an element"


def cases(setting: Setting) -> list[Case]:
    """Decoder in the setting's dtype; in float32 as well on a GPU, since both are in use."""
    dtypes = [setting.dtype, torch.float32] if setting.on_gpu else [setting.dtype]
    return [case(setting, dtype) for dtype in dtypes]


def case(setting: Setting, dtype: torch.dtype) -> Case:
    """Attribution with decoder, gradient and latents in `dtype`."""
    shapes, d = setting.shapes, setting.shapes.teacher_width
    n_bytes = moved_bytes(shapes.tokens, shapes.kept, d, shapes.label_topk, dtype.itemsize)
    floor, factor = copy_floor(n_bytes, setting)
    contestants = {name: lambda name=name: ours(name, shapes.label_topk) for name in setting.backends}
    contestants[PUBLIC] = lambda: public(public_way.attribution, shapes.label_topk)
    if setting.compiles(dtype == setting.dtype):
        contestants["compiled"] = lambda: public(
            torch.compile(public_way.attribution, dynamic=False), shapes.label_topk
        )
    contestants[FLOOR] = floor
    return Case(
        "concept_attribution",
        f"n{shapes.tokens}-d{d}-{str(dtype).removeprefix('torch.')}",
        {
            "N": shapes.tokens,
            "d": d,
            "C": shapes.concepts,
            "k": shapes.kept,
            "K": shapes.label_topk,
            "dtype": str(dtype),
        },
        lambda: make_inputs(setting, dtype),
        contestants,
        truth,
        errors,
        TOLERANCE[dtype],
        "bytes at the speed of a large copy, read and written bytes counted",
        factor,
        bytes=n_bytes,
        bytes_formula=BYTES,
        targets=(Target("triton", FLOOR, 1.5),),
    )


def moved_bytes(n: int, k: int, d: int, n_labels: int, itemsize: int) -> int:
    """`BYTES`; the values have the decoder's dtype."""
    return n * k * d * itemsize + n * d * itemsize + n * k * (itemsize + 8) + 8 * n * n_labels


@torch.no_grad()
def make_inputs(setting: Setting, dtype: torch.dtype) -> SimpleNamespace:
    """Positive active latents, a gradient and a decoder; the latents also as a dense matrix."""
    shapes, options = setting.shapes, {"device": setting.device}
    n, d = shapes.tokens, shapes.teacher_width
    values = torch.rand(n, shapes.kept, **options).add_(0.1).sort(1, descending=True).values.to(dtype)
    indices = distinct_indices(n, shapes.concepts, shapes.kept, setting.device)
    grad, decoder = torch.randn(n, d, **options).to(dtype), torch.randn(shapes.concepts, d, **options).to(dtype)
    latents = torch.zeros(n, shapes.concepts, dtype=dtype, **options).scatter_(1, indices, values)
    return SimpleNamespace(
        values=values,
        indices=indices,
        grad=grad,
        decoder=decoder,
        latents=latents,
        decoder_columns=decoder.t().contiguous(),
        label_topk=shapes.label_topk,
    )


def ours(backend: str, label_topk: int):
    """A step of `concept_attribution` with this backend."""

    def step(inputs):
        return {
            "labels": concept_attribution(
                inputs.values, inputs.indices, inputs.grad, inputs.decoder, label_topk, backend=backend
            )
        }

    return step


def public(function, label_topk: int):
    """A step of the public code's way."""

    @torch.no_grad()
    def step(inputs):
        best, labels = function(inputs.latents, inputs.grad, inputs.decoder_columns, label_topk)
        return {"best": best, "labels": labels}

    return step


@torch.no_grad()
def truth(inputs) -> SimpleNamespace:
    """Attributions of some tokens, dense, in the next wider precision."""
    wide = WIDER[inputs.grad.dtype]
    rows = sampled(len(inputs.grad), inputs.grad.device)
    attributions = inputs.latents[rows].to(wide) * (inputs.grad[rows].to(wide) @ inputs.decoder.to(wide).t())
    return SimpleNamespace(rows=rows, attributions=attributions)


@torch.no_grad()
def errors(inputs, known, outputs) -> dict[str, float]:
    """What the chosen labels' attributions lack to those of the true ones. No label, or one without attribution,
    counts as zero; the public way returns such where fewer than K are positive."""
    labels = outputs["labels"][known.rows]
    chosen = torch.where(labels >= 0, known.attributions.gather(1, labels.clamp(min=0)), 0)
    best = known.attributions.topk(inputs.label_topk, dim=1).values.clamp(min=0)
    return {"attributions": relative_error(chosen.sort(1, descending=True).values, best)}


def test_attribution(report, case, contestant):
    report(case, contestant)
