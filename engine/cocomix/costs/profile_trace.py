"""Traces of PyTorch's profiler, as Perfetto and chrome://tracing open them."""

import contextlib
import gzip
import shutil
import tempfile
from pathlib import Path

import torch

from cocomix.core.files import atomic_write
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
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(plain))
        with atomic_write(path) as file, open(plain, "rb") as source, gzip.GzipFile(fileobj=file, mode="wb") as packed:
            shutil.copyfileobj(source, packed)
