"""`concept_mix` against the public code's dense compress product with `stack` and `view`, and its bytes at copy speed.

    pytest benchmarks/bench_concept_mix.py [--full] [--benchmark-json FILE]

`forward` and `train` (with the gradient of every floating-point input) on concepts drawn evenly, and `train_hot`, where
four concepts are active at every token, as frequent ones are: their rows of the weight's gradient get one update from
each token. The public way gets its dense [B, T, C] matrix of masked logits as an input: making it is the concept
head's benchmark. The bytes count a weight row for each of a token's k concepts, as if no cache held any.

Shapes: B sequences of T tokens, N = B T, d width, C concepts, k kept.
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
from sweeps import sweep as swept

from cocomix_kernels import concept_mix, reference

MODES = ("forward", "train", "train_hot")
FORWARD_BYTES = "N d s of h + N k d s of weight rows + 2 N d s written + 12 N k + 8 N + 2 d s"
TRAIN_BYTES = (
    f"{FORWARD_BYTES}; backward: N d s of the concepts' gradient (dh is a view of the rest) + N k d s of weight rows"
    " + N k d s of gradient rows for dW + C d s (dW) + 16 N k + 16 N + 4 d s"
)
WANTED = ("hidden", "values", "weight", "bias", "pre_bias", "mean", "std")
HOT = 4
CHUNK = 512  # tokens of the truth at a time


def cases(setting: Setting) -> list[Case]:
    """Every mode at every width."""
    return [case(setting, mode, d) for d in setting.shapes.widths for mode in MODES]


def sweep(setting: Setting) -> list[Case]:
    """A training step over width, concepts, kept concepts and the sequence's length."""
    return swept(setting, "dCkT", lambda at: case(at, "train", at.shapes.widths[0]))


def case(setting: Setting, mode: str, d: int) -> Case:
    """One mode at width d."""
    shapes, trains = setting.shapes, mode != "forward"
    n = shapes.batch * shapes.length
    n_bytes = moved_bytes(n, shapes.kept, d, shapes.concepts, setting.dtype.itemsize, trains)
    floor, factor = copy_floor(n_bytes, setting)
    contestants = {name: lambda name=name: ours(name, trains) for name in setting.backends}
    contestants[PUBLIC] = lambda: public(public_way.mix, trains)
    if mode != "train_hot" and setting.compiles(d == shapes.widths[0]):
        contestants["compiled"] = lambda: public(torch.compile(public_way.mix, dynamic=False), trains)
    contestants[FLOOR] = floor
    target = Target("triton", PUBLIC, 1 / 5) if trains else Target("triton", FLOOR, 1.3)
    return Case(
        "concept_mix",
        f"{mode}-b{shapes.batch}-t{shapes.length}-d{d}",
        {
            "B": shapes.batch,
            "T": shapes.length,
            "d": d,
            "C": shapes.concepts,
            "k": shapes.kept,
            "mode": mode,
            "dtype": str(setting.dtype),
        },
        lambda: make_inputs(setting, d, hot=HOT if mode == "train_hot" else 0),
        contestants,
        lambda inputs: truth(inputs, trains),
        errors,
        TOLERANCE[setting.dtype],
        "bytes at the speed of a large copy, read and written bytes counted",
        factor,
        bytes=n_bytes,
        bytes_formula=TRAIN_BYTES if trains else FORWARD_BYTES,
        targets=(target,),
    )


def moved_bytes(n: int, k: int, d: int, c: int, s: int, trains: bool) -> int:
    """`FORWARD_BYTES` or `TRAIN_BYTES`: values, mean and std in float32, indices int64, the others `s` bytes."""
    forward = 3 * n * d * s + n * k * d * s + 12 * n * k + 8 * n + 2 * d * s
    if not trains:
        return forward
    return forward + n * d * s + 2 * n * k * d * s + 16 * n * k + 16 * n + c * d * s + 4 * d * s


@torch.no_grad()
def make_inputs(setting: Setting, d: int, hot: int = 0) -> SimpleNamespace:
    """What the concept head and the input normalisation leave; the kept values also as a dense matrix."""
    shapes, device, dtype = setting.shapes, setting.device, setting.dtype
    n, c, k = shapes.batch * shapes.length, shapes.concepts, shapes.kept
    indices = distinct_indices(n, c - hot, k - hot, device) + hot
    if hot:
        indices = torch.cat([torch.arange(hot, device=device).expand(n, hot), indices], dim=1)
    indices = indices.view(shapes.batch, shapes.length, k)

    def floats(*shape, scale=1.0, shift=0.0, dtype=dtype):
        return (scale * torch.randn(*shape, device=device) + shift).to(dtype)

    values = floats(*indices.shape, scale=0.3, shift=1.5, dtype=torch.float32)
    tokens = indices.shape[:2]
    inputs = SimpleNamespace(
        hidden=floats(*tokens, d),
        values=values,
        indices=indices,
        weight=floats(c, d, scale=0.02),
        bias=floats(d, scale=0.1),
        pre_bias=floats(d, scale=0.1),
        mean=floats(*tokens, 1, scale=0.1, dtype=torch.float32),
        std=1 + torch.rand(*tokens, 1, device=device),
        grad=floats(shapes.batch, 2 * shapes.length, d),
        masked=torch.zeros(*tokens, c, dtype=dtype, device=device).scatter_(2, indices, values.to(dtype)),
    )
    inputs.weight_columns = inputs.weight.t().contiguous()
    for name in (*WANTED, "masked", "weight_columns"):
        getattr(inputs, name).requires_grad_()
    return inputs


def ours(backend: str, trains: bool):
    """A step of `concept_mix` with this backend."""

    def step(inputs):
        wanted = [getattr(inputs, name) for name in WANTED]
        hidden, values, weight, *others = wanted
        with torch.set_grad_enabled(trains):
            mixed = concept_mix(hidden, values, inputs.indices, weight, *others, backend=backend)
        return outputs_of(mixed, wanted, inputs.grad, trains)

    return step


def public(function, trains: bool):
    """A step of the public code's way; its gradients of values and weight are dense, and that of the weight [d, C]."""

    def step(inputs):
        wanted = [
            inputs.hidden,
            inputs.masked,
            inputs.weight_columns,
            inputs.bias,
            inputs.pre_bias,
            inputs.mean,
            inputs.std,
        ]
        with torch.set_grad_enabled(trains):
            mixed = function(*wanted)
        return outputs_of(mixed, wanted, inputs.grad, trains)

    return step


def outputs_of(mixed, wanted, grad, trains):
    """The mix and the gradients by the names in `WANTED`."""
    found = torch.autograd.grad(mixed, wanted, grad) if trains else ()
    return {"mixed": mixed.detach()} | dict(zip(WANTED, found, strict=False))


@torch.no_grad()
def truth(inputs, trains: bool) -> SimpleNamespace:
    """The mix at some tokens by the reference, and every gradient a chunk at a time, in the next wider precision."""
    wide = WIDER[inputs.hidden.dtype]
    flat = {name: getattr(inputs, name).detach().to(wide) for name in WANTED}
    for name in ("hidden", "values", "mean", "std"):
        flat[name] = flat[name].flatten(0, 1)
    indices = inputs.indices.flatten(0, 1)
    rows = sampled(len(indices), indices.device)
    few = [t[rows][None] for t in (flat["hidden"], flat["values"], indices)]
    mixed = reference.concept_mix(
        *few, flat["weight"], flat["bias"], flat["pre_bias"], flat["mean"][rows][None], flat["std"][rows][None]
    )
    known = SimpleNamespace(rows=rows, mixed=mixed.view(len(rows), 2, -1), grads={})
    if trains:
        known.grads = exact_gradients(flat, indices, inputs.grad.unflatten(1, (-1, 2)).flatten(0, 1).to(wide))
    return known


def exact_gradients(flat, indices, grad) -> dict[str, torch.Tensor]:
    """Gradients by the names in `WANTED`, over N tokens; grad [N, 2, d]."""
    exact = {name: torch.zeros_like(t) for name, t in flat.items()}
    exact["hidden"] = grad[:, 0]
    weight, bias = flat["weight"], flat["bias"] + flat["pre_bias"]
    for rows in (slice(start, start + CHUNK) for start in range(0, len(indices), CHUNK)):
        of_concept, kept, values = grad[rows, 1], indices[rows], flat["values"][rows, :, None]
        gathered = weight[kept]  # [n, k, d]
        of_sum = of_concept * flat["std"][rows]
        exact["values"][rows] = (gathered * of_sum[:, None, :]).sum(2)
        exact["weight"].index_add_(0, kept.flatten(), (values * of_sum[:, None, :]).flatten(0, 1))
        exact["bias"] += of_sum.sum(0)
        exact["mean"][rows] = of_concept.sum(1, keepdim=True)
        exact["std"][rows] = (of_concept * ((gathered * values).sum(1) + bias)).sum(1, keepdim=True)
    exact["pre_bias"] = exact["bias"]
    return exact


@torch.no_grad()
def errors(inputs, known, outputs) -> dict[str, float]:
    """Relative errors of the mix at some tokens and of every gradient."""
    mixed = outputs["mixed"].unflatten(1, (-1, 2)).flatten(0, 1)[known.rows]
    found = {"mixed": relative_error(mixed, known.mixed)}
    for name, exact in known.grads.items():
        grad = outputs[name]
        if outputs["values"].shape == inputs.masked.shape:  # the public way's layouts
            grad = grad.gather(2, inputs.indices) if name == "values" else grad.t() if name == "weight" else grad
        found[f"d_{name}"] = relative_error(grad.reshape(exact.shape), exact)
    return found


def test_concept_mix(report, case, contestant):
    report(case, contestant)
