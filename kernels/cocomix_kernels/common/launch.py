"""How Triton kernels are started, and how a test learns which ones would be started without a GPU.

Every launch goes through `launch`. Inside `recording` nothing runs: the launches are written down with their
arguments and configurations, so that exactly what dispatch chooses for a shape can be compiled ahead of time.
"""

import contextlib
from dataclasses import dataclass

import torch
import triton

_recorder = None


@dataclass(frozen=True)
class Launch:
    """One kernel start: positional arguments in the kernel's order, constexprs by name, and its configuration."""

    kernel: object  # a triton.jit function
    arguments: tuple
    constants: dict
    num_warps: int
    num_stages: int


class _Recorder:
    def __init__(self, capability):
        self.capability, self.launches = capability, []


@contextlib.contextmanager
def recording(capability: tuple[int, int]):
    """Collect launches instead of running them, choosing configurations for a GPU of this compute capability.

    Yields the list of `Launch`. What the kernels would have written stays uninitialised.
    """
    global _recorder
    outer, _recorder = _recorder, _Recorder(capability)
    try:
        yield _recorder.launches
    finally:
        _recorder = outer


def is_recording() -> bool:
    """Whether launches are only written down."""
    return _recorder is not None


def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of the GPU to choose configurations for; (9, 0) where there is none."""
    if _recorder is not None:
        return _recorder.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def launch(kernel, grid, *arguments, num_warps=4, num_stages=3, **constants) -> None:
    """Start `kernel` on `grid` (a tuple; nothing happens where it is empty) on the first tensor's device."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, arguments, constants, num_warps, num_stages))
    elif all(grid):
        device = next(a.device for a in arguments if torch.is_tensor(a))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


next_power_of_2 = triton.next_power_of_2


def interpreted(kernel) -> bool:
    """Whether `kernel` runs in Triton's interpreter, which computes bfloat16 products wrongly."""
    return not isinstance(kernel, triton.runtime.JITFunction)
