"""How Triton kernels are started.

Every launch goes through `launch`. Inside `recording` nothing runs: the launches are written down with their
arguments and configurations, so that exactly what dispatch chooses for a shape can be compiled ahead of time.
"""

import contextlib
from typing import Any, cast

import torch
import triton  # pyright: ignore[reportMissingTypeStubs]

from cocomix_kernels.common.recording import Launch, recorder


def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of the GPU to choose configurations for; (9, 0) where there is none."""
    recording = recorder()
    if recording is not None:
        return recording.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> None:
    """Start `kernel` on `grid` (a tuple; nothing happens where it is empty) on the first tensor's device."""
    recording = recorder()
    if recording is not None:
        recording.launches.append(Launch(kernel, arguments, constants, num_warps, num_stages))
    elif all(grid):
        device = next(a.device for a in arguments if torch.is_tensor(a))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return int(cast(Any, triton).next_power_of_2(n))


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs in Triton's interpreter, which computes bfloat16 products wrongly."""
    return not isinstance(kernel, triton.runtime.JITFunction)
