"""Which backend runs an operation: torch on any device, triton on CUDA."""

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from cocomix_kernels.common.recording import is_recording

R = TypeVar("R")

BACKENDS = ("torch", "triton")
VARIABLE = "COCOMIX_BACKEND"


def choose_backend(
    operation: str,
    implementations: Mapping[str, Callable[..., R]],
    backend: str | None,
    device: torch.device,
    default: str | None = None,
) -> Callable[..., R]:
    """Return the implementation of `operation` to run.

    `implementations` maps a backend's name to a function; names beyond `BACKENDS` are libraries that this operation
    alone knows. An explicit `backend` is a demand and must exist. None means the environment variable
    COCOMIX_BACKEND, which is one of `BACKENDS`, or else `default`, or else triton on CUDA and torch elsewhere; each is
    a preference, and an operation without that backend runs with torch. Raises `ValueError` for an unknown name, for
    a demanded backend that the operation lacks, and for any but torch on a device where it cannot run.
    """
    demanded = backend is not None
    if demanded:
        known = tuple(dict.fromkeys((*BACKENDS, *implementations)))
    else:
        backend, known = os.environ.get(VARIABLE) or None, BACKENDS
    if backend is not None and backend not in known:
        source = "backend" if demanded else VARIABLE
        raise ValueError(f"{operation}: {source} is {backend!r}, expected one of {', '.join(known)}")
    if backend is None:
        backend = default or ("triton" if device.type == "cuda" else "torch")
    if backend in implementations:
        if not _runs_on(backend, device):
            raise ValueError(
                f"{operation}: the {backend} backend needs CUDA tensors, these are on {device}; "
                "use the torch backend there (TRITON_INTERPRET=1 lets tests interpret the triton backend on a CPU)"
            )
        return implementations[backend]
    if demanded:
        raise ValueError(
            f"{operation}: no {backend} backend exists for this operation; available: {', '.join(implementations)}"
        )
    return implementations["torch"]


def _runs_on(backend: str, device: torch.device) -> bool:
    if device.type == "cuda" or backend == "torch":
        return True
    if backend != "triton":
        return False
    return os.environ.get("TRITON_INTERPRET") == "1" or is_recording()
