"""Traces of PyTorch's profiler, as Perfetto and chrome://tracing open them."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import torch

from cocomix.core.files import atomic_path
from cocomix.core.machine import synchronize


@contextlib.contextmanager
def traced(path, device: torch.device):
    """Trace the block and write it to `path`, a `.json.gz`; with `path` None, as on all ranks but one, just run it."""
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        yield
        synchronize(device)
    with atomic_path(path) as aside, tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "trace.json.gz"  # PyTorch compresses what is called so
        profiled.export_chrome_trace(str(packed))
        shutil.move(packed, aside)
