"""What `gpu.py --profiles` runs: `cocomix profile` at the paper's three sizes, and what it should find on an H100."""

import sys
from pathlib import Path

from cocomix.costs.profile_results import ProfileResults
from cocomix.costs.profile_text import describe_profile

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 50257  # GPT-2's
# Windows to begin with; halved until two students with their optimizers fit beside each other, 20 bytes a weight.
WINDOWS = {"69m": 32, "386m": 16, "1.38b": 8}
LARGE_GPU = 100e9  # bytes; below, 1.38B would only fail at first
TINY = (
    "model.n_embd=32",
    "model.n_layer=3",
    "model.n_head=2",
    "model.insert_layer=1",
    "model.concept_dim=64",
    "model.concept_topk=4",
    "data.seq_len=16",
    "train.micro_batch=2",
    "train.precision=fp32",
)
EFFICIENCY, MEMORY = 0.90, 0.5  # at least, with cached labels; at most, of the public way's peak
SPEEDUP = {
    ("69m", "public cached"): 5.0,
    ("69m", "public online"): 3.0,
    ("1.38b", "public cached"): 1.8,
    ("1.38b", "public online"): 1.8,
}  # at least, over the public way
OVER_TRANSFORMERS = 1.0  # NTP here against transformers' GPT-2


def command(size: str, file: Path, memory: float | None) -> list[str]:
    """The command line that writes `file`; `memory` is the GPU's, in bytes, None on a CPU, where all is tiny."""
    start = [
        sys.executable,
        str(ROOT / "benchmarks" / "profile_against.py"),
        str(ROOT / "configs" / "openwebtext" / f"{size}.yaml"),
        "--against",
        "public",
        "--against",
        "transformers",
        "--json",
        str(file),
    ]
    if memory is None:
        return [*start, *TINY, "--labels", "cached", "--vocab-size", "128", "--rounds", "1"]
    windows = WINDOWS[size] // (2 if size == "1.38b" and memory < LARGE_GPU else 1)
    return [
        *start,
        f"train.micro_batch={windows}",
        "train.compile=true",
        "--fit",
        "--labels",
        "both",
        "--random-teacher",
        "--vocab-size",
        str(VOCABULARY),
        "--rounds",
        "6",
        "--steps",
        "3",
    ]


def targets(size: str, found: ProfileResults) -> list[tuple[str, float, bool]]:
    """(what should hold, the value, whether it does) for one size's profile."""
    methods = found.methods
    judged = []

    def judge(what, value, at_least=None, at_most=None):
        sign, bound = ("≥", at_least) if at_most is None else ("≤", at_most)
        judged.append((f"{what} {sign} {bound:g}", value, value >= bound if at_most is None else value <= bound))

    if "cached" in methods:
        judge("efficiency with cached labels", methods["cached"].efficiency, EFFICIENCY)
    for name, method in methods.items():
        if method.of is None:
            continue
        least = OVER_TRANSFORMERS if name == "transformers" else SPEEDUP.get((size, name))
        if least is not None:
            judge(f"tokens/s over {name}", method.slower.median, least)
        if name != "transformers" and method.windows == methods[method.of].windows:
            judge(
                f"peak memory of {name}",
                methods[method.of].peak_memory_gib / method.peak_memory_gib,
                at_most=MEMORY,
            )
    return judged


def text(profiles: dict[str, dict], on_gpu: bool) -> str:
    """Every size's tables, and on a GPU whether its targets are met."""
    lines = []
    for size, content in profiles.items():
        found = ProfileResults.from_json(content, f"the profile at {size}")
        lines += [f"\n{size}", describe_profile(found)]
        if on_gpu:
            judged = targets(size, found)
            lines += [f"{what}: {value:.3g}, {'met' if met else 'NOT met'}" for what, value, met in judged]
    return "\n".join(lines)
