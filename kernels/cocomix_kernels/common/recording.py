"""Launches written down instead of started: how a test learns, without a GPU, what dispatch would start.

Free of Triton, so that the choice of a backend can ask whether launches are only recorded.
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

_recorder: "_Recorder | None" = None


@dataclass(frozen=True)
class Launch:
    """One kernel start: positional arguments in the kernel's order, constexprs by name, and its configuration."""

    kernel: object  # a triton.jit function
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


class _Recorder:
    def __init__(self, capability: tuple[int, int]):
        self.capability = capability
        self.launches: list[Launch] = []


@contextlib.contextmanager
def recording(capability: tuple[int, int]) -> Generator[list[Launch]]:
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


def recorder() -> "_Recorder | None":
    """Where launches go instead of to a GPU; None where they are started."""
    return _recorder
