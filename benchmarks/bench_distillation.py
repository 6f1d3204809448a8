"""`linear_distillation` against `F.cross_entropy` and `F.kl_div` over full logits, and the bare products.

    pytest benchmarks/bench_distillation.py [--full] [--benchmark-json FILE]

A training step: losses and the gradients of the student's x and weight. `full` compares with the teacher's whole
distribution and includes its head's product; `top` with k kept tokens of it, as a cache holds them. The public way
does not fit at the paper's N; so that it can be compared, one case a width has a quarter of the tokens on a GPU.

Shapes: N tokens, d width of the student, d_t of the teacher, V tokens of the vocabulary, k kept ones.
"""

from types import SimpleNamespace

import public_way
import torch
from harness import TOLERANCE, WIDER, Case, Setting, distinct_indices, relative_error
from summary import EXTRA_MEMORY, FLOOR, PUBLIC, Target

from cocomix_kernels import FullTargets, TopTargets, linear_distillation, reference

MODES = ("full", "top")
VOCABULARY, TINY_VOCABULARY = 50257, 300  # GPT-2's
WEIGHT = 0.5  # of the KL
CHUNK = 256  # tokens of the truth at a time
BACKEND = "torch"  # there is no other


def cases(setting: Setting) -> list[Case]:
    """Both modes at every width, in a short run on a CPU at the first; on a GPU again at a quarter of the tokens."""
    tokens, widths = setting.shapes.tokens, setting.shapes.widths
    if not setting.on_gpu:
        return [
            case(setting, mode, d, tokens) for d in (widths if setting.size == "full" else widths[:1]) for mode in MODES
        ]
    return [case(setting, mode, d, n) for n in (tokens, tokens // 4) for d in widths for mode in MODES]


def case(setting: Setting, mode: str, d: int, n: int) -> Case:
    """One mode at width d with n tokens."""
    shapes = setting.shapes
    vocabulary = TINY_VOCABULARY if setting.size == "tiny" else VOCABULARY
    contestants = {BACKEND: lambda: contestant(ours), PUBLIC: lambda: contestant(PUBLIC_WAY[mode])}
    if setting.compiles(d == shapes.widths[0]):
        contestants["compiled"] = lambda: contestant(torch.compile(PUBLIC_WAY[mode], dynamic=False))
    contestants[FLOOR] = lambda: bare_products(setting, mode, n, vocabulary)
    teacher = shapes.teacher_width if mode == "full" else 0
    return Case(
        "linear_distillation",
        f"{mode}-n{n}-d{d}",
        {
            "N": n,
            "d": d,
            "d_t": shapes.teacher_width,
            "V": vocabulary,
            "k": shapes.kept,
            "mode": mode,
            "dtype": str(setting.dtype),
        },
        lambda: make_inputs(setting, mode, n, d, vocabulary),
        contestants,
        truth,
        errors,
        TOLERANCE[setting.dtype],
        "3 products of N*V*d (and one of N*V*d_t in full), each one library call",
        flops=2 * n * vocabulary * (3 * d + teacher),
        flops_formula="6 N V d (and 2 N V d_t in full)",
        targets=(Target(BACKEND, EXTRA_MEMORY, 512),),
    )


@torch.no_grad()
def make_inputs(setting: Setting, mode: str, n: int, d: int, vocabulary: int) -> SimpleNamespace:
    """Hidden states as a final norm leaves them, a student at its initial scale and a teacher that is sharper."""
    shapes, options = setting.shapes, {"device": setting.device}

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, **options)).to(setting.dtype)

    if mode == "full":
        targets = FullTargets(normal(n, shapes.teacher_width), normal(vocabulary, shapes.teacher_width, scale=0.1))
    else:
        shares = torch.cat([2 * torch.randn(n, shapes.kept, **options), torch.ones(n, 1, **options)], 1).log_softmax(1)
        targets = TopTargets(distinct_indices(n, vocabulary, shapes.kept, setting.device), shares[:, :-1].half())
    return SimpleNamespace(
        x=normal(n, d).requires_grad_(),
        weight=normal(vocabulary, d, scale=0.02).requires_grad_(),
        labels=torch.randint(vocabulary, (n,), **options),
        first=targets[0],
        second=targets[1],
        kind=type(targets),
    )


def ours(x, weight, labels, targets):
    """`linear_distillation` with the signature of `PUBLIC_WAY`."""
    return linear_distillation(x, weight, labels, targets, WEIGHT, backend=BACKEND)


def _public_full(x, weight, labels, targets):
    return public_way.distillation(x, weight, labels, *targets, WEIGHT)


def _public_top(x, weight, labels, targets):
    return public_way.top_distillation(x, weight, labels, *targets, WEIGHT)


PUBLIC_WAY = {"full": _public_full, "top": _public_top}


def contestant(function):
    """A step of `function`: losses, and gradients through the first."""

    def step(inputs):
        loss, ntp_loss, kl = function(inputs.x, inputs.weight, inputs.labels, inputs.kind(inputs.first, inputs.second))
        dx, dw = torch.autograd.grad(loss, (inputs.x, inputs.weight))
        return {"loss": loss.detach(), "ntp_loss": ntp_loss.detach(), "kl": kl.detach(), "dx": dx, "dw": dw}

    return step


def bare_products(setting: Setting, mode: str, n: int, vocabulary: int):
    """The products that cannot be avoided, each a single call of the library, into buffers that are there."""
    logits = torch.empty(n, vocabulary, dtype=setting.dtype, device=setting.device)

    @torch.no_grad()
    def step(inputs):
        if mode == "full":
            torch.mm(inputs.first, inputs.second.t(), out=logits)
        torch.mm(inputs.x, inputs.weight.t(), out=logits)
        torch.mm(logits, inputs.weight)
        torch.mm(logits.t(), inputs.x)

    return step


def truth(inputs) -> dict[str, torch.Tensor]:
    """The reference and its gradients in the next wider precision, a chunk at a time."""
    wide = WIDER[inputs.x.dtype]
    weight = inputs.weight.detach().to(wide).requires_grad_()
    n, kind, found = len(inputs.x), inputs.kind, {name: 0 for name in ("loss", "ntp_loss", "kl")}
    dx = []
    for rows in (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)):
        x = inputs.x.detach()[rows].to(wide).requires_grad_()
        second = inputs.second if kind is FullTargets else inputs.second[rows]
        losses = reference.linear_distillation(x, weight, inputs.labels[rows], kind(inputs.first[rows], second), WEIGHT)
        share = len(x) / n
        (share * losses.loss).backward()
        dx.append(x.grad)
        found = {name: found[name] + share * part.detach() for name, part in losses._asdict().items()}
    return found | {"dx": torch.cat(dx), "dw": weight.grad}


@torch.no_grad()
def errors(inputs, known, outputs) -> dict[str, float]:
    """Relative errors of the losses and of both gradients, all in full."""
    return {name: relative_error(outputs[name], exact) for name, exact in known.items()}


def test_linear_distillation(report, case, contestant):
    report(case, contestant)
