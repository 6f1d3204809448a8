"""What every test gets: two threads at most (one where test processes share the cores), interpreted Triton kernels
where there is no GPU, and the same random numbers in any order of tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, hence before anything else
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # test processes share the cores, and so do the programs that tests start
    os.environ["OMP_NUM_THREADS"] = "1"

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for programs that tests start: cores may be busy

settings.register_profile(
    "cocomix", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cocomix")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Text, token files, teacher, SAE and labels for tests of whole runs, once a module."""
    from run_helpers import labelled_world

    return labelled_world(tmp_path_factory.mktemp("world"))
