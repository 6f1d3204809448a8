"""`topk_linear` as the sparse autoencoder's encoder, against the public code's dense way and the bare product.

    pytest benchmarks/bench_topk_linear.py [--full] [--benchmark-json FILE]

`encode` is what labels need: no gradient. `train` adds the gradients of x, weight and bias through the kept values,
as SAE training does; there the floor is still the one product, since the rest is sparse.

Shapes: N tokens, d teacher width, C latents, k kept.
"""

from types import SimpleNamespace

import public_way
import torch
from harness import (
    TOLERANCE,
    WIDER,
    Case,
    Setting,
    relative_error,
    sampled,
    selection_error,
)
from summary import EXTRA_MEMORY, FLOOR, PUBLIC, Target
from sweeps import sweep as swept

from cocomix_kernels import topk_linear

MODES = ("encode", "train")
CHUNK = 512  # tokens of the truth at a time


def cases(setting: Setting) -> list[Case]:
    """Both modes at the teacher's width, and at the paper's larger widths with `--full`."""
    widths = [setting.shapes.teacher_width, *(setting.shapes.widths if setting.size == "full" else ())]
    return [case(setting, mode, d) for d in widths for mode in MODES]


def sweep(setting: Setting) -> list[Case]:
    """The encoder over tokens, width (here the student's, which a sweep varies), latents and kept latents."""
    return swept(setting, "NdCk", lambda at: case(at, "encode", at.shapes.widths[0]))


def case(setting: Setting, mode: str, d: int) -> Case:
    """One mode at width d."""
    shapes = setting.shapes
    contestants = {name: lambda name=name: ours(name, mode, shapes.kept) for name in setting.backends}
    contestants[PUBLIC] = lambda: public(public_way.sae_encode, mode, shapes.kept)
    if setting.compiles(d == shapes.teacher_width):
        contestants["compiled"] = lambda: public(torch.compile(public_way.sae_encode, dynamic=False), mode, shapes.kept)
    contestants[FLOOR] = lambda: bare_product(setting)
    at_teacher_width = mode == "encode" and d == shapes.teacher_width
    return Case(
        "topk_linear",
        f"{mode}-n{shapes.tokens}-d{d}",
        {"N": shapes.tokens, "d": d, "C": shapes.concepts, "k": shapes.kept, "mode": mode, "dtype": str(setting.dtype)},
        lambda: make_inputs(setting, d),
        contestants,
        truth,
        lambda *known: errors(*known, mode),
        TOLERANCE[setting.dtype],
        "one product of N*C*d, a single library call",
        flops=2 * shapes.tokens * d * shapes.concepts,
        flops_formula="2 N C d (the sparse gradients not counted)",
        targets=(Target("triton", FLOOR, 1.5), Target("triton", EXTRA_MEMORY, 512)) if at_teacher_width else (),
    )


def make_inputs(setting: Setting, d: int) -> SimpleNamespace:
    """Normalised activations and an encoder whose rows have length one."""
    shapes = setting.shapes
    x, weight, bias = (
        (scale * torch.randn(shape, device=setting.device)).to(setting.dtype).requires_grad_()
        for shape, scale in (((shapes.tokens, d), 1), ((shapes.concepts, d), d**-0.5), ((shapes.concepts,), 0.02))
    )
    grad = torch.randn(shapes.tokens, shapes.kept, device=setting.device)
    return SimpleNamespace(x=x, weight=weight, bias=bias, grad=grad)


def ours(backend: str, mode: str, k: int):
    """A step of `topk_linear` with ReLU and this backend."""

    def step(inputs):
        with torch.set_grad_enabled(mode == "train"):
            values, indices = topk_linear(inputs.x, inputs.weight, inputs.bias, k, relu=True, backend=backend)
        outputs = {"values": values.detach(), "indices": indices}
        return outputs | (gradients(values, inputs.grad, inputs) if mode == "train" else {})

    return step


def public(function, mode: str, k: int):
    """A step of the public code's way. The gradient of its dense latents is a constant, which costs it no reading."""

    def step(inputs):
        with torch.set_grad_enabled(mode == "train"):
            latents = function(inputs.x, inputs.weight, inputs.bias, k)
        cotangent = inputs.grad[0, 0].to(latents.dtype).expand_as(latents)
        return {"latents": latents.detach()} | (gradients(latents, cotangent, inputs) if mode == "train" else {})

    return step


def gradients(kept, cotangent, inputs):
    """dx, dw and db through the kept values."""
    found = torch.autograd.grad(kept, (inputs.x, inputs.weight, inputs.bias), cotangent)
    return dict(zip(("dx", "dw", "db"), found, strict=True))


def bare_product(setting: Setting):
    """The product as a single call of the library, into a buffer that is there."""
    shapes = setting.shapes
    activations = torch.empty(shapes.tokens, shapes.concepts, dtype=setting.dtype, device=setting.device)

    @torch.no_grad()
    def step(inputs):
        torch.mm(inputs.x, inputs.weight.t(), out=activations)

    return step


@torch.no_grad()
def truth(inputs) -> SimpleNamespace:
    """Activations of some rows in the next wider precision."""
    wide = WIDER[inputs.x.dtype]
    x, weight, bias = (t.detach().to(wide) for t in (inputs.x, inputs.weight, inputs.bias))
    rows = sampled(len(x), x.device)
    return SimpleNamespace(x=x, weight=weight, rows=rows, activations=x[rows] @ weight.t() + bias)


@torch.no_grad()
def errors(inputs, known, outputs, mode: str) -> dict[str, float]:
    """Relative errors of values and selection, and of the gradients through what was selected."""
    k = inputs.grad.shape[1]
    if "latents" in outputs:  # dense: kept ones are positive; where fewer than k are, the others are zeros anywhere
        values, indices = outputs["latents"].topk(k, dim=1)
        grad = inputs.grad[:1, :1].expand(len(values), k)
    else:
        values, indices, grad = outputs["values"], outputs["indices"], inputs.grad
    rows = known.rows
    found = {
        "values": relative_error(values[rows], known.activations.gather(1, indices[rows]).relu()),
        "selection": selection_error(known.activations.relu(), indices[rows]),
    }
    if mode == "train":
        exact = exact_gradients(known, indices, torch.where(values > 0, grad, 0).to(known.x.dtype))
        found |= {name: relative_error(outputs[name], t) for name, t in exact.items()}
    return found


def exact_gradients(known, indices, grad) -> dict[str, torch.Tensor]:
    """dx, dw and db of `grad` at the kept outputs, a chunk at a time."""
    dx, dw, db = torch.empty_like(known.x), torch.zeros_like(known.weight), known.x.new_zeros(len(known.weight))
    for rows in (slice(start, start + CHUNK) for start in range(0, len(indices), CHUNK)):
        g, kept = grad[rows], indices[rows]
        dx[rows] = (g[:, :, None] * known.weight[kept]).sum(1)
        dw.index_add_(0, kept.flatten(), (g[:, :, None] * known.x[rows, None, :]).flatten(0, 1))
        db.index_add_(0, kept.flatten(), g.flatten())
    return {"dx": dx, "dw": dw, "db": db}


def test_topk_linear(report, case, contestant):
    report(case, contestant)
