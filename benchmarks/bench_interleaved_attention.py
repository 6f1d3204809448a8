"""`interleaved_attention` against the library's causal attention over all 2T positions, FlexAttention and the floor.

    pytest benchmarks/bench_interleaved_attention.py [--full] [--benchmark-json FILE]

`full` is what all blocks but the last need: plain causal attention over 2T positions. There `public` is PyTorch's
scaled_dot_product_attention as it chooses, `chosen` what our dispatch picks by itself, `flash` and `cudnn` libraries
that it knows. `concept` is the last block, where only the concepts' queries matter: the public way computes all queries
and drops half of the result; `flex` is compiled FlexAttention with exactly the mask that is needed (CUDA only);
`full_torch` and `full_triton` are ours over all 2T queries, to compare with. q, k and v are strided views, as the
product that makes them leaves them.

Shapes: B sequences of T tokens, S = 2T positions, H heads of size D.
"""

from types import SimpleNamespace

import public_way
import torch
from harness import TOLERANCE, WIDER, Case, Setting, product_floor, relative_error
from summary import FLOOR, PUBLIC, Target
from sweeps import sweep as swept

from cocomix_kernels import interleaved_attention, reference

LIBRARIES = ("flash", "cudnn")  # backends for all queries on a GPU, where they are installed
FORMS = ("concept", "full")
FLOPS = "4 B H D for every pair of query and key that the mask allows; backward 2.5 times that"
NOISE = 1.02  # "never slower" up to what two runs of the same differ by


def cases(setting: Setting) -> list[Case]:
    """Both forms, training and forward alone, for every head size; training first."""
    return [
        case(setting, form, trains, n_heads, size)
        for trains in (True, False)
        for n_heads, size in setting.shapes.heads
        for form in FORMS
    ]


def sweep(setting: Setting) -> list[Case]:
    """Training in both forms over the sequence's length, with the first head size."""
    return [
        one
        for form in FORMS
        for one in swept(setting, "T", lambda at, form=form: case(at, form, True, *at.shapes.heads[0]))
    ]


def case(setting: Setting, form: str, trains: bool, n_heads: int, size: int) -> Case:
    """One form with this many heads of this size."""
    shapes = setting.shapes
    flops = attention_flops(shapes.batch, shapes.length, n_heads, size, form, trains)
    floor, factor = product_floor(flops, setting)
    way = public_way.last_attention if form == "concept" else public_way.attention
    contestants = {name: lambda name=name: ours(name, form, trains) for name in setting.backends}
    if form == "full":
        contestants |= {name: lambda name=name: ours(name, form, trains) for name in LIBRARIES if setting.on_gpu}
        contestants["chosen"] = lambda: ours(None, form, trains)
    elif trains:
        contestants |= {
            f"full_{name}": lambda name=name: ours(name, "full", trains, checked=False) for name in setting.backends
        }
    contestants[PUBLIC] = lambda: public(way, form, trains)
    smallest = (n_heads, size) == shapes.heads[0]
    if form == "concept" and setting.compiles(smallest):
        contestants["compiled"] = lambda: public(torch.compile(way, dynamic=False), form, trains)
    if form == "concept" and setting.on_gpu:
        contestants["flex"] = lambda: flex(setting, trains)
    contestants[FLOOR] = floor
    return Case(
        "interleaved_attention",
        f"{form}-{'train' if trains else 'forward'}-b{shapes.batch}-t{shapes.length}-h{n_heads}-d{size}",
        {
            "B": shapes.batch,
            "T": shapes.length,
            "H": n_heads,
            "D": size,
            "form": form,
            "mode": "train" if trains else "forward",
            "dtype": str(setting.dtype),
        },
        lambda: make_inputs(setting, n_heads, size),
        contestants,
        lambda inputs: truth(inputs, form),
        errors,
        TOLERANCE[setting.dtype],
        "FLOPs at the rate of a large square product in the library",
        factor,
        flops=flops,
        flops_formula=FLOPS,
        targets=targets(form, trains),
    )


def targets(form: str, trains: bool) -> tuple[Target, ...]:
    """The last block's queries against all queries and against FlexAttention; the choice against the default."""
    if form == "full":
        return (Target("chosen", PUBLIC, NOISE),)
    return (Target("triton", "full_triton", 0.55), Target("triton", "flex", 1.0)) if trains else ()


def attention_flops(batch: int, length: int, n_heads: int, size: int, form: str, trains: bool) -> int:
    """`FLOPS`. Two products forward; backward five, because the scores are computed once more."""
    pairs = length * (length + 1) if form == "concept" else length * (2 * length + 1)
    forward = 4 * batch * n_heads * size * pairs
    return forward * 7 // 2 if trains else forward


def make_inputs(setting: Setting, n_heads: int, size: int) -> SimpleNamespace:
    """Queries, keys and values as views of one product's output; the concepts' queries as their own product's."""
    shapes, positions = setting.shapes, 2 * setting.shapes.length

    def product(n_parts, length):
        out = torch.randn(shapes.batch, length, n_parts * n_heads * size, device=setting.device).to(setting.dtype)
        return [t.unflatten(2, (n_heads, size)).requires_grad_() for t in out.split(n_heads * size, dim=2)]

    q, k, v = product(3, positions)
    (concept_q,) = product(1, shapes.length)
    with torch.no_grad():
        concept_q.copy_(q[:, 1::2])
    grad = torch.randn(shapes.batch, positions, n_heads, size, device=setting.device).to(setting.dtype)
    return SimpleNamespace(q=q, k=k, v=v, concept_q=concept_q, grad=grad, concept_grad=grad[:, 1::2].contiguous())


def ours(backend: str | None, form: str, trains: bool, checked: bool = True):
    """A step of `interleaved_attention`: concept queries or all of them."""

    def step(inputs):
        q, grad = (inputs.concept_q, inputs.concept_grad) if form == "concept" else (inputs.q, inputs.grad)
        with torch.set_grad_enabled(trains):
            out = interleaved_attention(q, inputs.k, inputs.v, backend=backend)
        outputs = outputs_of(out, (q, inputs.k, inputs.v), grad, trains)
        return outputs if checked else None

    return step


def public(function, form: str, trains: bool):
    """A step of the public code's way, which takes all queries in either form."""

    def step(inputs):
        grad = inputs.concept_grad if form == "concept" else inputs.grad
        with torch.set_grad_enabled(trains):
            out = function(inputs.q, inputs.k, inputs.v)
        return outputs_of(out, (inputs.q, inputs.k, inputs.v), grad, trains)

    return step


def flex(setting: Setting, trains: bool):
    """A step of compiled FlexAttention whose mask lets query t see keys 0..2t+1."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch, head, query, key):
        return key <= 2 * query + 1

    length = setting.shapes.length
    mask = create_block_mask(visible, None, None, length, 2 * length, device=setting.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def step(inputs):
        q, k, v = (t.transpose(1, 2) for t in (inputs.concept_q, inputs.k, inputs.v))
        with torch.set_grad_enabled(trains):
            out = compiled(q, k, v, block_mask=mask).transpose(1, 2)
        return outputs_of(out, (inputs.concept_q, inputs.k, inputs.v), inputs.concept_grad, trains)

    return step


def outputs_of(out, wanted, grad, trains):
    """The output and the gradients of q, k and v."""
    found = torch.autograd.grad(out, wanted, grad) if trains else ()
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), found, strict=False))


def truth(inputs, form: str) -> dict[tuple[int, int], list[torch.Tensor]]:
    """Output and gradients of the first sequence's first head and the last one's last, in the next wider precision."""
    q, grad = (inputs.concept_q, inputs.concept_grad) if form == "concept" else (inputs.q, inputs.grad)
    batch, _, n_heads, _ = q.shape
    exact = {}
    for b, h in {(0, 0), (batch - 1, n_heads - 1)}:
        arguments = [
            t[b : b + 1, :, h : h + 1].detach().to(WIDER[t.dtype]).requires_grad_() for t in (q, inputs.k, inputs.v)
        ]
        out = reference.interleaved_attention(*arguments)
        gradients = torch.autograd.grad(out, arguments, grad[b : b + 1, :, h : h + 1].to(out.dtype))
        exact[b, h] = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))
    return exact


@torch.no_grad()
def errors(_, known, outputs) -> dict[str, float]:
    """The larger relative error of the two heads, for the output and every gradient there is."""
    found = {}
    for name, tensor in outputs.items():
        if name == "dq" and tensor.shape[1] != next(iter(known.values()))["dq"].shape[1]:
            tensor = tensor[:, 1::2]  # all queries' gradient, of which the hidden states' is zero
        found[name] = max(
            relative_error(tensor[b : b + 1, :, h : h + 1], exact[name]) for (b, h), exact in known.items()
        )
    return found


def test_interleaved_attention(report, case, contestant):
    report(case, contestant)
