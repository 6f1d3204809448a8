"""Which backend runs an operation: torch on any device, triton on CUDA."""

import os

import torch

BACKENDS = ("torch", "triton")
VARIABLE = "COCOMIX_BACKEND"


def choose_backend(operation: str, implementations: dict, backend: str | None, device: torch.device):
    """Return the implementation of `operation` to run.

    `implementations` maps a backend's name to a function. An explicit `backend` is a demand and must exist. None
    means the environment variable COCOMIX_BACKEND, or else triton on CUDA and torch elsewhere; either is a
    preference, and an operation without that backend runs with torch. Raises `ValueError` for an unknown name, for a
    demanded backend that the operation lacks, and for triton on a device where it cannot run.
    """
    demanded = backend is not None
    if backend is None:
        backend = os.environ.get(VARIABLE) or ("triton" if device.type == "cuda" else "torch")
    if backend not in BACKENDS:
        source = "backend" if demanded else VARIABLE
        raise ValueError(f"{operation}: {source} is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend in implementations:
        if backend == "triton" and not _triton_runs_on(device):
            raise ValueError(
                f"{operation}: the triton backend needs CUDA tensors, these are on {device}; "
                "use the torch backend there (TRITON_INTERPRET=1 lets tests interpret the kernels on a CPU)"
            )
        return implementations[backend]
    if demanded:
        raise ValueError(
            f"{operation}: no {backend} backend exists for this operation; available: {', '.join(implementations)}"
        )
    return implementations["torch"]


def _triton_runs_on(device):
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return True
    from cocomix.kernels.triton_kernels.launch import is_recording

    return is_recording()
