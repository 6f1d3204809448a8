"""pytest-benchmark runs the kernel benchmarks; this adds the options, the measuring and the table.

pytest-benchmark measures one function after another with a timer of the host. Ratios between contestants need rounds
that alternate between them, and a GPU needs its own clock. So a case is measured as a whole (`harness.measure`) when
the first of its contestants comes up, and pytest-benchmark is then shown the times: its timer here is a clock that
stands still except for what each round of that contestant took. Its files, comparisons and statistics work as ever.
"""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import machine
import summary
from harness import Setting, measure

from cocomix.core.machine import describe

RUN = pytest.StashKey()


class ShownTime:
    """A timer that moves only when it is told by how much."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def show(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


SHOWN = ShownTime()


class Run:
    """One session: what is measured so far, and where figures go."""

    def __init__(self, config):
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        size = "full" if config.getoption("--full") else "tiny" if config.getoption("--tiny") else "short"
        self.setting, self.sweeps = Setting(device, size), config.getoption("--sweep")
        self.machine = describe(device)
        self.deadline = time.monotonic() + config.getoption("--budget")
        self.file = config.getoption("--figures")
        self.measured, self.rows, self.absent = {}, [], []

    def cases(self, module) -> list:
        """What a benchmark file declares, with --sweep its sweeps too; a shape that both have comes once."""
        found = module.cases(self.setting)
        known = [case.shape for case in found]
        if self.sweeps and hasattr(module, "sweep"):
            found += [case for case in module.sweep(self.setting) if case.shape not in known]
        return found

    def results(self, case):
        """Every contestant's `Measured`, measuring at the first call; None where no time is left for that."""
        key = case.operation, case.name
        if key not in self.measured:
            in_time = time.monotonic() < self.deadline
            self.measured[key] = measure(case, self.setting) if in_time else None
        return self.measured[key]

    def report(self, benchmark, case, name: str) -> None:
        """Hand contestant `name` of the case to pytest-benchmark, to the table and to the file of figures."""
        results = self.results(case)
        if results is None:
            self.leave_out(case, name, "no time left")
            pytest.skip("no time left (--budget)")
        if results[name].absent:
            self.leave_out(case, name, results[name].absent)
            pytest.skip(results[name].absent)
        if results[name].failed:
            self.leave_out(case, name, "FAILED")
            pytest.fail(results[name].failed, pytrace=False)
        ran = {one: result for one, result in results.items() if result.ran}
        row = summary.figures(name, case, ran, self.setting.on_gpu)
        times = iter(results[name].times)
        benchmark.extra_info.update(row)
        benchmark.pedantic(lambda: SHOWN.show(next(times)), rounds=len(results[name].times))
        self.rows.append(row)
        self.write(row)

    def leave_out(self, case, name: str, reason: str) -> None:
        """Say why a contestant has no figures."""
        row = {"operation": case.operation, "case": case.name, "contestant": name, "absent": reason}
        self.absent.append((summary.title(row), name, reason))
        self.write(row)

    def write(self, row: dict) -> None:
        """Append a line to the file of figures, so that a run that is cut short keeps what it had."""
        if self.file:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def heading(self) -> str:
        """What the table below it was measured on."""
        where = ", ".join(f"{key} {value}" for key, value in self.machine.items() if value is not None)
        if self.setting.on_gpu:
            return where
        return f"On a CPU: torch backend, small shapes, float32; targets hold for a GPU.\n{where}"


def pytest_addoption(parser):
    add = parser.getgroup("kernel benchmarks").addoption
    add("--full", action="store_true", help="larger shapes and more rounds; the public way compiled everywhere")
    add("--tiny", action="store_true", help="very small shapes, to try the benchmarks")
    add("--sweep", action="store_true", help="also vary one dimension at a time: N, d, C, k, T")
    add("--threads", type=int, help="CPU threads (default: cores that are free, at most four)")
    add("--budget", type=float, default=float("inf"), metavar="S", help="start no case later than this, seconds")
    add("--figures", metavar="FILE", help="append each figure to this file as a line of JSON")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own
def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads") or machine.free_cores())
    config.stash[RUN] = Run(config)
    if hasattr(config.option, "benchmark_quiet") and config.option.verbose < 1:
        config.option.benchmark_quiet = True  # the table below says more


def pytest_collect_file(file_path, parent):
    """`pytest benchmarks` finds bench_*.py, as files named on the command line are found by pytest itself."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    if "contestant" not in metafunc.fixturenames:
        return
    metafunc.parametrize(
        ("case", "contestant"),
        [
            pytest.param(
                case,
                name,
                id=f"{case.name}-{name}",
                marks=pytest.mark.benchmark(group=f"{case.operation} {case.name}", timer=SHOWN),
            )
            for case in metafunc.config.stash[RUN].cases(metafunc.module)
            for name in case.contestants
        ],
    )


@pytest.fixture
def report(request, benchmark):
    """report(case, contestant): measure where that is still to be done, and hand the figures on."""
    return lambda case, name: request.config.stash[RUN].report(benchmark, case, name)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """The file that pytest-benchmark writes says what ours do about the machine."""
    machine_info["cocomix"] = config.stash[RUN].machine | {"time": datetime.now(UTC).isoformat(timespec="seconds")}


def pytest_terminal_summary(terminalreporter, config):
    """The table."""
    run = config.stash[RUN]
    if run.rows or run.absent:
        terminalreporter.section("figures")
        terminalreporter.write_line(run.heading())
        terminalreporter.write_line("")
        terminalreporter.write_line(summary.table(run.rows, run.absent))
