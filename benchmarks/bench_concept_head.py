"""`concept_head` against the public code's way and the bare products.

    pytest benchmarks/bench_concept_head.py [--full] [--benchmark-json FILE]

Four modes: `loss_values` is a training step (gradients through the loss and the kept values), `loss` the same without
the values' part, `evaluate` no labels and no gradient, `evaluate_loss` labels and no gradient. The public way holds
tens of GiB at the paper's N; so that it can be compared on a smaller GPU too, one case a width has a quarter of the
tokens. The gradient that the kept values get is the same constant for each, which spares the public way reading an
[N, C] cotangent.

Shapes: N tokens, d width, C concepts, k kept, K labels.
"""

from types import SimpleNamespace

import public_way
import torch
from harness import (
    TOLERANCE,
    WIDER,
    Case,
    Setting,
    distinct_indices,
    relative_error,
    sampled,
    selection_error,
)
from summary import EXTRA_MEMORY, FLOOR, PUBLIC, Target
from sweeps import sweep as swept

from cocomix_kernels import concept_head

MODES = ("loss_values", "loss", "evaluate", "evaluate_loss")
TRAINING = ("loss_values", "loss")
COMPILED = ("loss_values", "evaluate")  # where there is no time for all
AT_MOST = {512: 1.5, 1024: 1.28, 2048: 1.15}  # times the three bare products, by width
CHUNK = 4096  # rows of the truth at a time


def cases(setting: Setting) -> list[Case]:
    """Training at every width, the same at a quarter of the tokens, then the other modes."""
    shapes = setting.shapes
    training = [("loss_values", d, n) for n in (shapes.tokens, shapes.tokens // 4) for d in shapes.widths]
    others = [(mode, d, shapes.tokens) for mode in MODES[1:] for d in shapes.widths]
    return [case(setting, *one) for one in training + others]


def sweep(setting: Setting) -> list[Case]:
    """A training step over tokens, width, concepts and kept concepts."""
    return swept(setting, "NdCk", lambda at: case(at, "loss_values", at.shapes.widths[0], at.shapes.tokens))


def case(setting: Setting, mode: str, d: int, n: int) -> Case:
    """One mode at width d with n tokens."""
    shapes, trains = setting.shapes, mode in TRAINING
    products = 3 if trains else 1
    contestants = {name: lambda name=name: ours(name, mode, shapes.kept) for name in setting.backends}
    contestants[PUBLIC] = lambda: public(public_way.concept_head, mode, shapes.kept)
    if n == shapes.tokens and setting.compiles(d == shapes.widths[0] and mode in COMPILED):
        contestants["compiled"] = lambda: public(
            torch.compile(public_way.concept_head, dynamic=False), mode, shapes.kept
        )
    contestants[FLOOR] = lambda: bare_products(setting, n, trains)
    full_size = mode == "loss_values" and n == shapes.tokens
    return Case(
        "concept_head",
        f"{mode}-n{n}-d{d}",
        {
            "N": n,
            "d": d,
            "C": shapes.concepts,
            "k": shapes.kept,
            "K": shapes.label_topk,
            "mode": mode,
            "dtype": str(setting.dtype),
        },
        lambda: make_inputs(setting, n, d),
        contestants,
        lambda inputs: truth(inputs, mode),
        lambda *known: errors(*known, mode),
        TOLERANCE[setting.dtype],
        "3 products of N*C*d (1 in evaluation), each one library call",
        flops=2 * products * n * d * shapes.concepts,
        flops_formula="6 N C d (2 N C d in evaluation)",
        targets=targets(d) if full_size else (Target("triton", PUBLIC, 1 / 3),) if mode == "loss_values" else (),
    )


def targets(d: int) -> tuple[Target, ...]:
    """What a training step of the paper's sizes should reach."""
    floor = (Target("triton", FLOOR, AT_MOST[d]),) if d in AT_MOST else ()
    return *floor, Target("triton", PUBLIC, 1 / 3), Target("triton", EXTRA_MEMORY, 512)


def make_inputs(setting: Setting, n: int, d: int) -> SimpleNamespace:
    """Normalised activations, weights at their initial scale, and K distinct labels for every token."""
    shapes, options = setting.shapes, {"device": setting.device}
    x, weight, bias = (
        (scale * torch.randn(shape, **options)).to(setting.dtype).requires_grad_()
        for shape, scale in (((n, d), 1), ((shapes.concepts, d), 0.02), ((shapes.concepts,), 0.02))
    )
    labels = distinct_indices(n, shapes.concepts, shapes.label_topk, setting.device)
    value_grad = torch.full((n, shapes.kept), 1 / n, device=setting.device)
    return SimpleNamespace(x=x, weight=weight, bias=bias, labels=labels, value_grad=value_grad, k=shapes.kept)


def ours(backend: str, mode: str, k: int):
    """A step of `concept_head` with this backend."""

    def forward(inputs):
        labels = None if mode == "evaluate" else inputs.labels
        return concept_head(inputs.x, inputs.weight, inputs.bias, k, labels, backend=backend)

    def step(inputs):
        if mode not in TRAINING:
            with torch.no_grad():
                values, indices, loss = forward(inputs)
            return present(values=values, indices=indices, loss=loss)
        values, indices, loss = forward(inputs)
        return present(
            values=values.detach(),
            indices=indices,
            loss=loss.detach(),
            **gradients(mode, loss, values, inputs.value_grad, inputs),
        )

    return step


def public(function, mode: str, k: int):
    """A step of the public code's way, plain or compiled."""

    def step(inputs):
        arguments = inputs.x, inputs.weight, inputs.bias, k
        if mode not in TRAINING:
            with torch.no_grad():
                masked, indices, loss = function(*arguments, inputs.labels if mode == "evaluate_loss" else None)
            return present(masked=masked, indices=indices, loss=loss)
        masked, indices, loss = function(*arguments, inputs.labels)
        cotangent = inputs.value_grad[0, 0].to(masked.dtype).expand_as(masked)
        return present(
            masked=masked.detach(),
            indices=indices,
            loss=loss.detach(),
            **gradients(mode, loss, masked, cotangent, inputs),
        )

    return step


def gradients(mode, loss, kept, cotangent, inputs):
    """dx, dw and db through the loss, and in `loss_values` through the kept values as well."""
    outputs, grads = ((loss, kept), (None, cotangent)) if mode == "loss_values" else ((loss,), (None,))
    found = torch.autograd.grad(outputs, (inputs.x, inputs.weight, inputs.bias), grads)
    return dict(zip(("dx", "dw", "db"), found, strict=True))


def present(**tensors):
    """Those that are not None."""
    return {name: t for name, t in tensors.items() if t is not None}


def bare_products(setting: Setting, n: int, trains: bool):
    """The products that cannot be avoided, each a single call of the library, into buffers that are there."""
    logits = torch.empty(n, setting.shapes.concepts, dtype=setting.dtype, device=setting.device)

    @torch.no_grad()
    def step(inputs):
        torch.mm(inputs.x, inputs.weight.t(), out=logits)
        if trains:
            torch.mm(logits, inputs.weight)
            torch.mm(logits.t(), inputs.x)

    return step


@torch.no_grad()
def truth(inputs, mode: str) -> SimpleNamespace:
    """Logits of some rows, and the dense loss with its gradients, a chunk at a time in the next wider precision."""
    wide = WIDER[inputs.x.dtype]
    x, weight, bias = (t.detach().to(wide) for t in (inputs.x, inputs.weight, inputs.bias))
    rows = sampled(len(x), x.device)
    known = SimpleNamespace(x=x, weight=weight, rows=rows, logits=x[rows] @ weight.t() + bias)
    if mode == "evaluate":
        return known
    known.loss = x.new_zeros(())
    known.dx, known.dw, known.db = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    share = 1 / (len(x) * inputs.labels.shape[1])
    for start in range(0, len(x), CHUNK):
        chunk, labels = x[start : start + CHUNK], inputs.labels[start : start + CHUNK]
        log_p = (chunk @ weight.t() + bias).log_softmax(1)
        known.loss -= share * log_p.gather(1, labels).sum()
        if mode in TRAINING:
            g = log_p.exp_().div_(len(x)).scatter_add_(1, labels, torch.full_like(labels, -share, dtype=wide))
            known.dx[start : start + CHUNK] = g @ weight
            known.dw += g.t() @ chunk
            known.db += g.sum(0)
    return known


@torch.no_grad()
def errors(inputs, known, outputs, mode: str) -> dict[str, float]:
    """Relative errors of values, selection, loss and gradients; the kept values' part follows what was selected."""
    rows, indices = known.rows, outputs["indices"]
    values = outputs["values"][rows] if "values" in outputs else outputs["masked"][rows].gather(1, indices[rows])
    found = {
        "values": relative_error(values, known.logits.gather(1, indices[rows])),
        "selection": selection_error(known.logits, indices[rows]),
    }
    if "loss" in outputs:
        found["loss"] = relative_error(outputs["loss"], known.loss)
    if mode in TRAINING:
        exact = {"dx": known.dx.clone(), "dw": known.dw.clone(), "db": known.db.clone()}
        if mode == "loss_values":
            add_values_gradient(inputs, known, indices, exact)
        found |= {name: relative_error(outputs[name], t) for name, t in exact.items()}
    return found


def add_values_gradient(inputs, known, indices, exact) -> None:
    """Add what reaches x, weight and bias through the kept values, a chunk at a time."""
    chunk = max(1, CHUNK // indices.shape[1])
    for rows in (slice(start, start + chunk) for start in range(0, len(indices), chunk)):
        g, kept = inputs.value_grad[rows].to(known.x.dtype), indices[rows]
        exact["dx"][rows] += (g[:, :, None] * known.weight[kept]).sum(1)
        exact["dw"].index_add_(0, kept.flatten(), (g[:, :, None] * known.x[rows, None, :]).flatten(0, 1))
        exact["db"].index_add_(0, kept.flatten(), g.flatten())


def test_concept_head(report, case, contestant):
    report(case, contestant)
