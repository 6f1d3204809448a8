"""What figures are measured on: the machine in words, the rate of its products, and the memory that a call takes."""

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

T = TypeVar("T")

COMMIT_VARIABLE = "COCOMIX_COMMIT"  # names the commit where the code is a copy without its history
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler announces every start and stop
_CHECKOUT = Path(__file__).resolve().parents[3]  # where this is not an installed copy
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square product whose rate stands for the chip
_COLLECTIVES_END_S = 0.05  # by when gloo's threads have seen a collective's end and dropped its tensors
_PRODUCTS = {"cpu": 1, "cuda": 20}  # in one measurement


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit, as every file of figures holds them."""
    found: dict[str, Any] = {"device": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)}
    if device.type == "cuda":
        found |= {"driver": _driver(), "cuda": torch.version.cuda}
    return found | {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's short commit, "-dirty" where tracked files differ from it, "unknown" where nothing tells."""
    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        return named
    if _output("git", "rev-parse", "--show-toplevel") != str(_CHECKOUT):
        return "unknown"  # installed somewhere below another project's checkout
    return _output("git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*") or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    return (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown").splitlines()[0]


def _triton_version() -> str | None:
    try:
        import triton  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return None
    return triton.__version__


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=_CHECKOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ProductRate:
    """The rate of a large square matrix product in `dtype`, the most that a model's products can reach."""

    def __init__(self, device: torch.device, dtype: torch.dtype, side: int | None = None):
        self.device, self.side = device, side or _PRODUCT_SIDE[device.type]
        self._left, self._right = (torch.randn(self.side, self.side, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty_like(self._left)
        self.measure()  # the first one is slower

    def measure(self) -> float:
        """Floating-point operations a second."""
        products = _PRODUCTS[self.device.type]
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(self._left, self._right, out=self._out)
        synchronize(self.device)
        return products * 2 * self.side**3 / (time.perf_counter() - start)


def peak_bytes(function: Callable[[], T], device: torch.device) -> tuple[int, T]:
    """Call `function` and return (the most bytes that tensors took above those at the start, what it returned)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    recorded = cast(Any, profiled.profiler).kineto_results.events()  # untyped
    events = [event for event in recorded if event.name() == "[memory]"]
    held = np.cumsum([0] + [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max()), result


def kept_bytes(function: Callable[[], T], device: torch.device) -> tuple[int, T]:
    """Call `function` and return (bytes of tensors that are alive after it and were not before, what it returned)."""
    before = _live_bytes(device)
    result = function()
    return _live_bytes(device) - before, result


def _live_bytes(device: torch.device) -> int:
    """Bytes of all tensors on a GPU; on a CPU, where the profiler misses what other threads free, as those of
    collectives do, of the memory behind all tensors that Python holds."""
    synchronize(device)
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    time.sleep(_COLLECTIVES_END_S)
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was too small, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: " in str(error)


def give_memory_back(device: torch.device) -> None:
    """Drop what nobody refers to and the allocator's spare blocks, so that the next call finds all there is."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
