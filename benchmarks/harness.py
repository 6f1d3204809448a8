"""How an operation is measured: what a benchmark file declares, and the run that compares its contestants.

A benchmark file declares *cases*: one operation at one shape in one mode. Every case has *contestants* that do the
same work, among them the floor (what the hardware cannot avoid) and the public code's way. They are measured together:

1. each contestant runs once on the first input set and must agree with the truth, which is computed in the next wider
   precision; a wrong one gets no figures;
2. its peak memory is taken;
3. rounds in which every contestant runs once, in turn forwards and backwards, on the next of several input sets.

So a machine that drifts hits all of them, and ratios compare neighbours in time.
"""

import gc
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from machine import Clock, cache_bytes, rotating_sets, rotation_budget
from summary import Target

from cocomix.core.machine import give_memory_back, is_out_of_memory, peak_bytes

ROUNDS = {"tiny": (2, 2), "short": (5, 50), "full": (9, 100)}  # fewest and most
SECONDS = {"tiny": 0.1, "short": 1.5, "full": 6.0}  # that the rounds of a case should take together
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative error of a norm; bfloat16 rounds at 4e-3
UNAVAILABLE = ("backend exists", "no flash_attn is installed", "No available kernel")  # in what an error says
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}  # what the truth is computed in


@dataclass(frozen=True)
class Shapes:
    """N tokens for what works on rows, batch * length for mixing and attention; C concepts, k kept, K labels."""

    tokens: int
    batch: int
    length: int
    concepts: int
    kept: int
    widths: tuple[int, ...]  # of the student
    teacher_width: int
    heads: tuple[tuple[int, int], ...]  # of the attention: how many and how wide
    probe: int  # side of the square product whose rate is the floor of attention
    label_topk: int = 4


PAPER = Shapes(65536, 32, 1024, 32768, 32, (512, 1024, 2048), 768, ((8, 64), (16, 128)), 8192)
SHAPES = {
    ("cuda", "short"): PAPER,
    ("cuda", "full"): replace(PAPER, heads=((8, 64), (16, 64), (16, 128))),
    ("cpu", "short"): Shapes(512, 2, 256, 4096, 32, (256, 512), 768, ((8, 64),), 1024),
    ("cpu", "full"): Shapes(1024, 2, 512, 32768, 32, (512, 1024), 768, ((8, 64), (8, 128)), 2048),
}
TINY = Shapes(64, 2, 32, 256, 8, (32,), 48, ((2, 16),), 64)


@dataclass(frozen=True)
class Setting:
    """Where and at what size to measure; `size` is "tiny" (to try the program), "short" or "full". A sweep gives the
    shapes itself."""

    device: torch.device
    size: str = "short"
    given: Shapes | None = None

    @property
    def shapes(self) -> Shapes:
        """The paper's on a GPU, small ones on a CPU."""
        if self.given is not None:
            return self.given
        return TINY if self.size == "tiny" else SHAPES[self.device.type, self.size]

    @property
    def on_gpu(self) -> bool:
        """Whether targets apply."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slower."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def backends(self) -> tuple[str, ...]:
        """Ours that can run here."""
        return ("triton", "torch") if self.on_gpu else ("torch",)

    def compiles(self, smallest: bool) -> bool:
        """Whether the public way compiled is a contestant: compiling takes longer than all that is measured here."""
        if self.given is not None:
            return False
        return self.size == "full" or (self.on_gpu and self.size == "short" and smallest)


@dataclass(frozen=True)
class Case:
    """One operation at one shape in one mode, and who competes in it.

    `contestants` maps a name to a function that makes a step: `make() -> step`, `step(inputs) -> outputs`, a dict of
    tensors to check, or None where there is nothing to check. What `make` allocates lives as long as the case is
    being measured. The floor's times are multiplied by `floor_factor`, because it may be a sample of a known size.
    """

    operation: str
    name: str
    shape: dict
    inputs: Callable[[], SimpleNamespace]  # a fresh input set
    contestants: dict[str, Callable]
    truth: Callable  # of one input set
    errors: Callable  # (inputs, truth, outputs) -> relative errors by name
    tolerance: float
    floor_formula: str
    floor_factor: float = 1.0
    flops: float | None = None
    flops_formula: str | None = None
    bytes: float | None = None
    bytes_formula: str | None = None
    targets: tuple[Target, ...] = ()


@dataclass
class Measured:
    """What is known of one contestant: figures, or why there are none."""

    times: list[float] = field(default_factory=list)  # seconds, one a round
    peak: int = 0  # bytes above the inputs
    extra: int = 0  # of those, beside what the step returns
    errors: dict[str, float] = field(default_factory=dict)
    absent: str | None = None  # it cannot run here
    failed: str | None = None  # it should and does not, or is wrong

    @property
    def ran(self) -> bool:
        """Whether it has figures."""
        return self.absent is None and self.failed is None


def copy_floor(n_bytes: float, setting: Setting):
    """A floor of `n_bytes` at copy speed: (make, factor). The copied buffer is larger than any cache."""
    size = {"tiny": 2**16, "short": 2**25, "full": 2**27}[setting.size] if not setting.on_gpu else 2**30

    def make():
        source, target = (torch.ones(size, dtype=torch.uint8, device=setting.device) for _ in range(2))

        def step(_):
            target.copy_(source)

        return step

    return make, n_bytes / (2 * size)


def product_floor(flops: float, setting: Setting):
    """A floor of `flops` at the rate of a large square product in the library: (make, factor)."""
    side = setting.shapes.probe

    def make():
        left, right = (torch.randn(side, side, device=setting.device).to(setting.dtype) for _ in range(2))

        def step(_):
            torch.mm(left, right)

        return step

    return make, flops / (2 * side**3)


def measure(case: Case, setting: Setting) -> dict[str, Measured]:
    """Gate, memory and interleaved times of every contestant of the case."""
    torch.manual_seed(0)
    sets = _input_sets(case, setting)
    truth = case.truth(sets[0])
    steps, measured = {}, {}
    for name, make in case.contestants.items():
        measured[name] = result = Measured()
        steps[name] = _guarded(result, setting.device, _admit, case, make, sets, truth, result, setting)
    del truth
    give_memory_back(setting.device)
    _time(steps, sets, measured, setting)
    if "floor" in measured:
        measured["floor"].times = [case.floor_factor * t for t in measured["floor"].times]
    steps.clear(), sets.clear()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # or the next case's shapes count as recompilations, which end in plain execution
    give_memory_back(setting.device)
    return measured


def _input_sets(case, setting):
    first = case.inputs()
    size = sum(t.numel() * t.element_size() for t in vars(first).values() if torch.is_tensor(t))
    n_sets = rotating_sets(size, cache_bytes(setting.device), rotation_budget(setting.device))
    return [first, *(case.inputs() for _ in range(n_sets - 1))]


def _guarded(result, device, call, *arguments):
    """What the call returns, or None with the reason in `result`. No reference to a failed call's tensors survives."""
    try:
        return call(*arguments)
    except Exception as error:
        if is_out_of_memory(error):
            result.absent = "out of memory"
        elif any(sign in str(error) for sign in UNAVAILABLE):
            result.absent = str(error).splitlines()[0]
        else:
            result.failed = "".join(traceback.format_exception(error))
    result.times.clear()
    give_memory_back(device)
    return None


def _admit(case, make, sets, truth, result, setting):
    """Make the step, let it prove itself on the first input set, and take its memory on the second."""
    step = make()
    outputs = step(sets[0])
    if outputs is not None:
        result.errors = {name: float(e) for name, e in case.errors(sets[0], truth, outputs).items()}
        wrong = {name: e for name, e in result.errors.items() if not e <= case.tolerance}  # NaN is wrong too
        if wrong:
            raise AssertionError(f"wrong results, relative errors above {case.tolerance:g}: {wrong}")
    del outputs
    result.peak, outputs = peak_bytes(lambda: step(sets[-1]), setting.device)
    result.extra = result.peak - _returned_bytes(outputs, sets[-1])
    return step


def _returned_bytes(outputs, inputs):
    """Bytes of the storages behind the outputs, each counted once, and not where it is an input's."""

    def storages(tensors):
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if torch.is_tensor(t)}

    theirs = storages(vars(inputs).values())
    return sum(size for place, size in storages((outputs or {}).values()).items() if place not in theirs)


def _time(steps, sets, measured, setting):
    clock = Clock(setting.device)
    turn = 0

    def run(name):
        nonlocal turn
        turn += 1
        inputs = sets[turn % len(sets)]
        return _guarded(measured[name], setting.device, clock.seconds, lambda: steps[name](inputs))

    def running():
        return [name for name, result in measured.items() if result.ran]

    gc.collect()
    gc.disable()
    try:
        round_seconds = sum(run(name) or 0 for name in running())
        fewest, most = ROUNDS[setting.size]
        rounds = max(fewest, min(most, int(SECONDS[setting.size] / round_seconds))) if round_seconds else 0
        for number in range(rounds):
            for name in running()[:: -1 if number % 2 else 1]:
                seconds = run(name)
                if seconds is not None:
                    measured[name].times.append(seconds)
    finally:
        gc.enable()


def relative_error(actual, exact) -> float:
    """Norm of the error over the norm of the exact value, both in the exact one's precision."""
    return ((actual.to(exact.dtype) - exact).norm() / exact.norm()).item()


def sampled(n: int, device, count: int = 64) -> torch.Tensor:
    """Up to `count` indices below n, evenly spread, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, count), device=device, dtype=torch.float64).round().long()


def distinct_indices(n: int, width: int, k: int, device) -> torch.Tensor:
    """[n, k] random indices below `width`, distinct in each row, without a matrix of n * width anywhere."""
    start = torch.randint(width, (n, 1), device=device)
    stride = torch.randint(1, width // k + 1, (n, 1), device=device)
    return (start + stride * torch.arange(k, device=device)) % width


def selection_error(exact, indices) -> float:
    """How far the entries at `indices` [n, k] fall short of the k best of `exact` [n, C]; inf where one repeats."""
    ordered = indices.sort(1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return float("inf")
    best = exact.topk(indices.shape[1], dim=1).values
    return relative_error(exact.gather(1, indices).sort(1, descending=True).values, best)
