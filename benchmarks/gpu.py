"""Every GPU test and benchmark in one run of at most ten minutes, into one JSON file.

    python benchmarks/gpu.py [--out FILE] [--minutes 9] [--parts tests,concept_head] [--commit NAME]
    python benchmarks/gpu.py --profiles       # cocomix profile at the paper's three sizes instead
    python benchmarks/gpu.py --cpu ...        # without a GPU, on tiny shapes: to try the script
    python benchmarks/gpu.py --show FILE      # the table of such a file

First the fast tests of the kernels, then the kernel benchmarks at the paper's shapes, and with what time is left the
slow tests. With --profiles a run of its own: `cocomix profile` in bfloat16, compiled, at the largest micro batch that
fits, with cached and online labels, against the public way and transformers' GPT-2.

Each part has a share of the time that remains when it starts, so what one leaves over goes to the next; a benchmark
starts no further case when its share is nearly spent and is stopped when it is spent. A part that fails or is stopped
is recorded with the end of its output and the next one starts. The file is written anew after every part, so a run
that is cut short leaves what it had.

Exit status: 0 when nothing failed (skipped parts are listed), 1 when a part failed or was stopped, 2 when the script
cannot run here.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHORTEST = 5.0  # seconds; a part with less is not worth starting
TAIL = 4000  # characters of a failed part's output that are kept
NOTHING_SELECTED = 5  # pytest's exit status where no test has the marker
GRACE = 10.0  # seconds that an interrupted part gets to write its report
PACKAGES = {"pytest_benchmark": "pytest-benchmark"}  # where pip's name differs from the module's
BASE = ("torch", "numpy", "wrapt", "pytest", "cocomix")


@dataclass(frozen=True)
class Part:
    """What to run, its weight when the time is shared out, and the modules that it needs beside the base."""

    name: str
    weight: float
    needs: tuple[str, ...]


TESTS, SLOW_TESTS = "tests", "slow_tests"
PARTS = (
    Part(TESTS, 180, ("hypothesis", "triton")),
    Part("concept_head", 120, ("pytest_benchmark",)),
    Part("topk_linear", 35, ("pytest_benchmark",)),
    Part("attribution", 25, ("pytest_benchmark",)),
    Part("concept_mix", 60, ("pytest_benchmark",)),
    Part("interleaved_attention", 70, ("pytest_benchmark",)),
    Part("distillation", 40, ("pytest_benchmark",)),
    Part(SLOW_TESTS, 60, ("hypothesis", "triton")),
)
PROFILE = "profile_"  # and the size: a name in configs/openwebtext
PROFILES = tuple(
    Part(PROFILE + size, 100, ("deepspeed", "transformers", "omegaconf", "tokenizers", "safetensors"))
    for size in ("69m", "386m", "1.38b")
)


def main() -> int:
    """Run the parts, write the file after each, and return the exit status."""
    options = parse()
    sys.path.insert(0, str(HERE))
    if options.show:
        show(Path(options.show))
        return 0
    started = time.monotonic()
    missing = absent_modules(BASE)
    if missing:
        print(f"missing: {', '.join(missing)}. {how_to_install(missing)}")
        return 2
    import torch

    from cocomix.core.machine import COMMIT_VARIABLE, describe

    on_gpu = torch.cuda.is_available() and not options.cpu
    if not on_gpu and not options.cpu:
        print(
            "no GPU here: torch.cuda.is_available() is false. The kernel benchmarks run on a CPU with `make bench`; "
            "--cpu tries this script on tiny shapes."
        )
        return 2
    if options.commit:
        os.environ[COMMIT_VARIABLE] = options.commit
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # methods of one profile share memory
    report = {
        "benchmark": "gpu",
        **describe(torch.device("cuda:0" if on_gpu else "cpu")),
        "on_gpu": on_gpu,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "parts": [],
        "figures": [],
        "profiles": {},
    }
    out = Path(options.out) if options.out else default_file(report)
    parts = [part for part in (*PARTS, *PROFILES) if part.name in options.parts]
    absent = absent_modules({module for part in parts for module in part.needs})
    if absent:
        print(f"parts that need {', '.join(absent)} are skipped. {how_to_install(absent)}")
    for number, part in enumerate(parts):
        limit = time_share(parts[number:], started + 60 * options.minutes - time.monotonic())
        record = run_part(part, limit, on_gpu, options.workers, report)
        report["parts"].append(record)
        report["seconds"] = time.monotonic() - started
        write(out, report)
        print(f"{part.name:22} {record['status']:9} {record.get('seconds', 0):6.1f} s  {record.get('reason', '')}")
    conclude(report, out)
    return 1 if any(record["status"] in ("failed", "stopped") for record in report["parts"]) else 0


def parse():
    """The command line; unknown parts are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, profiles = [part.name for part in PARTS], [part.name for part in PROFILES]
    parser.add_argument("--out", help="the file to write (default: benchmarks/results/DEVICE-DATE-COMMIT.json)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        help=f"some of {','.join(names)}, which run by default, and {','.join(profiles)}",
    )
    parser.add_argument("--profiles", action="store_true", help="run the profiles instead of the default parts")
    parser.add_argument("--workers", type=int, default=4, help="processes for the tests, where pytest-xdist is there")
    parser.add_argument("--commit", help="what to record where the code is a copy without its history")
    parser.add_argument("--show", metavar="FILE", help="print the table of this file and measure nothing")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, on tiny shapes")
    options = parser.parse_args()
    options.parts = options.parts or (profiles if options.profiles else names)
    unknown = set(options.parts) - {*names, *profiles}
    if unknown:
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join([*names, *profiles])}")
    return options


def absent_modules(names) -> list[str]:
    """Those that cannot be imported here."""
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


def how_to_install(modules) -> str:
    """The command that makes them importable."""
    packages = " ".join(PACKAGES.get(name, name) for name in modules if name != "cocomix")
    commands = [f"pip install {packages}"] if packages else []
    if "cocomix" in modules:
        commands.append("pip install --no-deps --no-build-isolation -e . (in the repository's root)")
    return "Install with: " + "; ".join(commands)


def time_share(parts: list[Part], left: float) -> float:
    """Seconds for the first of these parts, when all of them share `left` seconds by weight."""
    return max(0.0, left) * parts[0].weight / sum(part.weight for part in parts)


def default_file(report: dict) -> Path:
    """Where results of this device, day and commit are kept."""
    device = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    return HERE / "results" / f"{device}-{report['time'][:10]}-{report['commit']}.json"


def run_part(part: Part, limit: float, on_gpu: bool, workers: int, report: dict) -> dict:
    """Run one part for at most `limit` seconds; figures go into the report. Returns the part's record."""
    absent = absent_modules(part.needs)
    if absent:
        return {"name": part.name, "status": "skipped", "reason": f"needs {', '.join(absent)}"}
    if limit < SHORTEST:
        return {"name": part.name, "status": "skipped", "reason": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = time.monotonic()
        status, output = run(command_of(part, limit, on_gpu, workers, folder), limit)
        record = {"name": part.name, "status": status, "seconds": time.monotonic() - start, "limit": limit}
        collect(part, folder, record, report)
    if status != "passed":
        record["output_tail"] = output[-TAIL:]
    return record


def command_of(part: Part, limit: float, on_gpu: bool, workers: int, folder: Path) -> list[str]:
    """The part's command line. Tests write junit.xml, benchmarks figures.jsonl, profiles profile.json."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if part.name in (TESTS, SLOW_TESTS):
        marker = "slow" if part.name == SLOW_TESTS else "not slow"
        parallel = ["-n", str(workers)] if workers > 1 and on_gpu and not absent_modules(["xdist"]) else []
        return [
            *pytest,
            *parallel,
            "--tb=short",
            "-m",
            marker,
            "--durations=10",
            f"--junitxml={folder / 'junit.xml'}",
            *kernel_tests(),
        ]
    if part.name.startswith(PROFILE):
        return profile_command(part.name.removeprefix(PROFILE), folder / "profile.json", on_gpu)
    alone = ["-p", "no:xdist"] if not absent_modules(["xdist"]) else []
    return [
        *pytest,
        *alone,
        str(HERE / f"bench_{part.name}.py"),
        f"--budget={0.8 * limit - 5:.0f}",
        f"--figures={folder / 'figures.jsonl'}",
        *([] if on_gpu else ["--tiny"]),
    ]


def profile_command(size: str, file: Path, on_gpu: bool) -> list[str]:
    """The command line of one size's profile."""
    import torch
    from gpu_profiles import command

    return command(size, file, torch.cuda.get_device_properties(0).total_memory if on_gpu else None)


def kernel_tests() -> list[str]:
    """The test files of the operations and of their kernels."""
    return sorted(map(str, (ROOT / "tests" / "kernels").rglob("test_*.py")))


def run(command: list[str], limit: float) -> tuple[str, str]:
    """(passed | failed | stopped, output). A part whose time is over is interrupted, which lets it write its report,
    and then killed with all its processes."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            status = "passed" if process.wait(limit) in (0, NOTHING_SELECTED) else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped"
            process.send_signal(signal.SIGINT)
            try:
                process.wait(min(GRACE, limit))
            except subprocess.TimeoutExpired:
                pass
        finally:
            kill_group(process)
        log.seek(0)
        return status, log.read()


def kill_group(process) -> None:
    """End what the part left running; its session is its own, so nothing else is in the group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def collect(part: Part, folder: Path, record: dict, report: dict) -> None:
    """Take what the part wrote into its record and the report."""
    if (folder / "junit.xml").exists():
        record["tests"] = test_results(folder / "junit.xml")
    if (folder / "figures.jsonl").exists():
        lines = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
        report["figures"] += [line for line in lines if "absent" not in line]
        record["left_out"] = [line for line in lines if "absent" in line]
    if (folder / "profile.json").exists():
        found = json.loads((folder / "profile.json").read_text())
        report["profiles"][part.name.removeprefix(PROFILE)] = found


def test_results(junit: Path) -> dict:
    """Counts, and every failure with the end of its message; broken XML of a stopped run counts as nothing."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except ElementTree.ParseError:
        return {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    bad = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = len({id(case) for case, _ in bad})
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": (child.text or "")[-TAIL:]}
        for case, child in bad
    ]
    return {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped, "failures": failures}


def write(out: Path, report: dict) -> None:
    """The report, aside and renamed."""
    from cocomix.core.files import write_json

    write_json(out, report)


def show(path: Path) -> None:
    """The table of a file that this script wrote."""
    from summary import table, title

    report = json.loads(path.read_text(encoding="utf-8"))
    absent = [
        (title(line), line["contestant"], line["absent"])
        for record in report["parts"]
        for line in record.get("left_out", ())
    ]
    print({key: value for key, value in report.items() if key not in ("parts", "figures", "profiles")})
    print(table(report["figures"], absent))
    show_profiles(report)


def show_profiles(report: dict) -> None:
    """The profiles' tables, where there are some."""
    if report.get("profiles"):
        from gpu_profiles import text

        print(text(report["profiles"], report["on_gpu"]))


def conclude(report: dict, out: Path) -> None:
    """What a person wants to see last: targets, what was left out, and where the file lies."""
    for row in report["figures"]:
        for target in row["targets"]:
            value = "-" if target["value"] is None else f"{target['value']:.3g}"
            print(
                f"{row['operation']} {row['case']} {row['contestant']}: {target['target']}: {value}, "
                f"{target['verdict']}"
            )
    show_profiles(report)
    lines = [line for record in report["parts"] for line in record.get("left_out", ())]
    reasons = {(line["operation"], line["case"], line["absent"]): [] for line in lines}
    for line in lines:
        reasons[line["operation"], line["case"], line["absent"]].append(line["contestant"])
    for (operation, case, reason), names in reasons.items():
        print(f"left out: {operation} {case} {', '.join(names)}: {reason}")
    for record in report["parts"]:
        if "output_tail" in record:
            print(f"\n--- {record['name']} {record['status']}; the end of its output:\n{record['output_tail'][-1500:]}")
    skipped = [f"{record['name']} ({record['reason']})" for record in report["parts"] if record["status"] == "skipped"]
    print(
        f"skipped: {', '.join(skipped) or 'nothing'}\n{len(report['figures'])} figures and {len(report['profiles'])} "
        f"profiles in {out}"
    )


if __name__ == "__main__":
    sys.exit(main())
