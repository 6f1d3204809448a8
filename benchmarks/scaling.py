"""How tokens/s, the ratio to next-token prediction and memory grow with batch, context, concepts and ranks.

    python benchmarks/scaling.py CONFIG [KEY=VALUE ...] [--batch 1,2,4] [--seq-len 256,512,1024]
        [--concepts 4096,8192,16384] [--ranks 1,2] [--vocab-size 50257] [--out runs/scaling]

For every value of a dimension `cocomix profile` runs in a process of its own, NTP against CoCoMix with cached labels;
the other dimensions stay as the config says. A dimension ends where memory or devices do. Its other values, and
`--beyond` doublings of the last one, are predicted by the arithmetic of `cocomix plan`, as are the measured ones, so
that the picture shows how far off the arithmetic is. What it is told and what it assumes is in `ASSUMED`.

Writes scaling.json and scaling_DIMENSION.png into --out. scaling.json: `machine`, `config`, `overrides`, `cluster`
(`cocomix.costs.cluster.Cluster`), `assumed`, and `dimensions`: by name a list of points with `value`, `measured` (by
method `tokens_per_s` and `peak_memory_gib`; `ratio` with its spread) or null with `reason`, and `predicted`
(`fits` as well).
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cocomix.core.config import Config, load_config
from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write, write_json
from cocomix.core.machine import describe, synchronize
from cocomix.core.precision import settled
from cocomix.costs.cluster import Cluster
from cocomix.costs.planner import configured, make_job, predict
from cocomix.costs.profile_inputs import baseline
from cocomix.costs.profile_results import ProfileResults
from cocomix.report.figures import LINES, FigureEntry, draw

DIMENSIONS = {  # by option: setting, axis
    "batch": ("train.micro_batch", "windows in a micro batch"),
    "seq_len": ("data.seq_len", "window length T"),
    "concepts": ("model.concept_dim", "concepts C"),
    "ranks": (None, "ranks"),
}
ASSUMED = (
    "Products and attention run at the rate that the first profile found for a large square product, at every shape.",
    "Everything else moves bytes at the speed of a large copy, measured here.",
    "Every rank is as fast as the one that was measured alone: on a CPU ranks share its cores, and are slower.",
    "Links, latencies and the host's time to start a kernel are the defaults of a cluster file, not measured; on a CPU "
    "starting an operation counts as nothing.",
)
NO_MEMORY = "does not fit into memory"  # in what `cocomix profile` says
COPY_BYTES, COPIES = {"cpu": 2**27, "cuda": 2**30}, 10
METHODS = {"ntp": "NTP", "cached": "CoCoMix, cached labels"}


def main(arguments=None) -> int:
    """Measure, predict, write, and say where. 2 for settings that cannot be run."""
    options = parse(arguments)
    out = Path(options.out)
    try:
        config = load_config(options.config, options.overrides)
        found = scale(config, options)
        write_json(out / "scaling.json", found)
        for name, points in found["dimensions"].items():
            entry = FigureEntry(f"scaling_{name}", DIMENSIONS[name][1], "", picture)
            with atomic_write(out / f"scaling_{name}.png") as file:
                file.write(draw(entry, DIMENSIONS[name][1], points)[2])
    except CocomixError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    print(table(found), f"written: {out}", sep="\n")
    return 0


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    for name in DIMENSIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=values, metavar="VALUES", help="for example 1,2,4")
    parser.add_argument("--vocab-size", type=int, help="take random tokens of so many ids, and no token files")
    parser.add_argument("--rounds", type=int, default=3, help="of each profile")
    parser.add_argument("--beyond", type=int, default=2, help="doublings that are predicted alone (default: 2)")
    parser.add_argument("--out", default="runs/scaling")
    options = parser.parse_intermixed_args(arguments)
    if not any(getattr(options, name) for name in DIMENSIONS):
        parser.error("nothing to vary: pass --batch, --seq-len, --concepts or --ranks")
    return options


def values(text: str) -> list[int]:
    """Whole numbers from 1, smallest first."""
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 1:
        raise ValueError
    return found


def scale(config: Config, options) -> dict:
    """What scaling.json holds. Raises `CocomixError` where a profile fails for another reason than memory."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config, _ = settled(config, device.type)
    measured = {name: measure(name, options, config, device) for name in DIMENSIONS if getattr(options, name)}
    first = next((profile for points in measured.values() for profile, _ in points.values() if profile), None)
    if first is None:
        raise CocomixError("not even the smallest value fits into memory: there is nothing to continue")
    cluster = cluster_of(first, device)
    vocabulary = first.student.vocab_size
    dimensions = {}
    for name, points in measured.items():
        last = max(points)
        points |= {last << number: (None, "predicted alone") for number in range(1, options.beyond + 1)}
        dimensions[name] = [
            {
                "value": value,
                "measured": profile and figures(profile),
                "reason": reason,
                "predicted": prediction(at(config, name, value), ranks_at(name, value), cluster, vocabulary, device),
            }
            for value, (profile, reason) in points.items()
        ]
    return {
        "kind": "scaling",
        "machine": describe(device),
        "config": str(options.config),
        "overrides": options.overrides,
        "cluster": dataclasses.asdict(cluster),
        "assumed": ASSUMED,
        "dimensions": dimensions,
    }


# ---- measured


def measure(name: str, options, config: Config, device) -> dict[int, tuple[dict | None, str | None]]:
    """By value its profile, or None and why there is none."""
    devices = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count()
    found, ended = {}, None
    for value in getattr(options, name):
        if name == "ranks" and value > devices:
            ended = f"only {devices} devices are here"
        profile = None
        if ended is None:
            print(f"measuring {name} {value}", file=sys.stderr, flush=True)
            profile = run_profile(name, value, options, config)
            ended = None if profile else "out of memory"
        found[value] = profile, ended
    return found


def run_profile(name: str, value: int, options, config: Config) -> ProfileResults | None:
    """What is found by one `cocomix profile`, None where memory does not suffice."""
    setting, ranks = DIMENSIONS[name][0], ranks_at(name, value)
    batch = value if name == "batch" else config.train.micro_batch
    overrides = [
        *options.overrides,
        *([f"{setting}={value}"] if setting else []),
        f"train.global_batch={whole_batch(config, batch, ranks)}",
    ]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    tokens = ["--vocab-size", str(options.vocab_size)] if options.vocab_size else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        done = subprocess.run(
            [
                sys.executable,
                *start,
                "-m",
                "cocomix",
                "profile",
                options.config,
                *overrides,
                "--labels",
                "cached",
                "--no-breakdown",
                "--rounds",
                str(options.rounds),
                *tokens,
                "--json",
                str(file),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return ProfileResults.read(file)
    if NO_MEMORY in done.stderr or done.returncode == -9:  # the system ends what takes the host's memory
        return None
    raise CocomixError(f"cocomix profile failed at {name} {value}: {(done.stderr.strip() or 'no output')[-2000:]}")


def whole_batch(config: Config, micro_batch: int, ranks: int) -> int:
    """The config's global batch, rounded up to what micro batches on all ranks divide."""
    return -(-config.train.global_batch // (micro_batch * ranks)) * micro_batch * ranks


def figures(profile: ProfileResults) -> dict:
    """What is drawn of a profile, as JSON."""
    found = {name: profile.methods[name] for name in METHODS}
    methods = {
        name: {"tokens_per_s": method.tokens_per_s, "peak_memory_gib": method.peak_memory_gib}
        for name, method in found.items()
    }
    return {**methods, "ratio": dataclasses.asdict(found["cached"].ratio)}


# ---- predicted


def ranks_at(name: str, value: int) -> int:
    """Ranks of a point: other dimensions are measured on one."""
    return value if name == "ranks" else 1


def at(config: Config, name: str, value: int) -> Config:
    """The config at a point, with labels from a cache."""
    changes = {"data": {}, "model": {}, "train": {}, "concept_labels": {"cache": "cached"}}
    if DIMENSIONS[name][0]:
        section, _, key = DIMENSIONS[name][0].partition(".")
        changes[section][key] = value
    changes["train"]["global_batch"] = whole_batch(
        config, value if name == "batch" else config.train.micro_batch, ranks_at(name, value)
    )
    return dataclasses.replace(
        config,
        **{section: dataclasses.replace(getattr(config, section), **changed) for section, changed in changes.items()},
    )


def cluster_of(profile: ProfileResults, device) -> Cluster:
    """This machine as a cluster of `cocomix plan`."""
    rate = profile.product_flops_per_s.median / 1e12
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return Cluster(
        name="this machine",
        memory_gb=memory / 1e9,
        product_tflops=rate,
        fp32_tflops=rate,
        attention_tflops=rate,
        memory_tb_s=copy_rate(device) / 1e12,
        **({} if device.type == "cuda" else {"launch_us": 0.0}),
    )


def copy_rate(device) -> float:
    """Bytes a second, read and written, of a large copy: the median."""
    source, target = (torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(COPIES):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * len(source) / sorted(times)[COPIES // 2]


def prediction(config: Config, ranks: int, cluster: Cluster, vocab_size: int, device) -> dict:
    """`cocomix plan`'s figures for both methods, and their ratio."""
    found = {}
    for name, of in (("ntp", baseline(config)), ("cached", config)):
        job = make_job(of, cluster, vocab_size)
        setup = dataclasses.replace(configured(job, ranks).setup, device=device.type)
        one = predict(job, setup)
        found[name] = {"tokens_per_s": one.tokens_per_s, "peak_memory_gib": one.memory.total / 2**30, "fits": one.fits}
    ratio = found["ntp"]["tokens_per_s"] / found["cached"]["tokens_per_s"]
    return {**found, "ratio": {"median": ratio}}


# ---- shown


def picture(axis: str, points: list[dict]):
    """Figure: tokens/s, ratio and memory over one dimension. Measured points are solid, predicted ones hollow."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for (method, label), (color, _, marker) in zip(METHODS.items(), LINES, strict=False):
        for axes, key in ((panels[0], "tokens_per_s"), (panels[2], "peak_memory_gib")):
            _lines(axes, points, lambda found, method=method, key=key: found[method][key], color, marker, label)
    color, _, marker = LINES[1]
    _lines(panels[1], points, lambda found: found["ratio"]["median"], color, marker, METHODS["cached"])
    ticks = [point["value"] for point in points]
    for axes, title in zip(panels, ("tokens/s", "time a token over NTP's", "peak memory of a rank (GiB)"), strict=True):
        axes.set(xlabel=axis, title=title, xscale="log", ylim=(0, None))
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, rotation=30 if len(ticks) > 5 else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format(value, ",.0f" if value >= 1e3 else ".4g")))
    handles = {line.get_label(): line for line in panels[0].lines}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=2, frameon=False, handlelength=4)
    return figure


def _lines(axes, points, value_of, color, marker, label):
    measured = [(point["value"], value_of(point["measured"])) for point in points if point["measured"]]
    predicted = [(point["value"], value_of(point["predicted"])) for point in points]
    axes.plot(
        *zip(*predicted, strict=True),
        color=color,
        linestyle="--",
        linewidth=1.1,
        marker=marker,
        markerfacecolor="white",
        label=f"{label}: predicted",
    )
    if measured:
        axes.plot(*zip(*measured, strict=True), color=color, marker=marker, label=f"{label}: measured")


def table(found: dict) -> str:
    """A line for each point: measured / predicted."""
    lines = []
    for name, points in found["dimensions"].items():
        lines.append(
            f"{name}: measured / predicted\n{'':>8}{'NTP tokens/s':>24}{'CoCoMix tokens/s':>24}{'ratio':>16}"
            f"{'CoCoMix GiB':>18}"
        )
        for point in points:
            both = point["measured"], point["predicted"]
            cells = [
                _pair(both, 24, ",.0f", lambda one, method=method: one[method]["tokens_per_s"]) for method in METHODS
            ]
            cells.append(_pair(both, 16, ".2f", lambda one: one["ratio"]["median"]))
            cells.append(_pair(both, 18, ".3g", lambda one: one["cached"]["peak_memory_gib"]))
            lines.append(f"{point['value']:>8,}{''.join(cells)}  {point['reason'] or ''}".rstrip())
    return "\n".join([*lines, *(f"assumed: {line}" for line in found["assumed"])])


def _pair(both, width, form, value_of):
    return " / ".join("-" if one is None else format(value_of(one), form) for one in both).rjust(width)


if __name__ == "__main__":
    sys.exit(main())
