"""Threads that do not wait for one another by spinning where other programs need the cores."""

import os
import sys

import psutil

_SAMPLE_S = 0.3
_BUSY_CORES = 0.5  # of others, from which on spinning costs more than waking up
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # with which a user decides


def wait_passively_on_busy_cores() -> None:
    """Let PyTorch's threads sleep while they wait where others keep the cores busy now; call it before PyTorch is
    imported, since its OpenMP library reads the setting when it is loaded.

    A thread that spins at the end of each parallel loop takes the time that the loop's last thread needs on a shared
    core. Sleeping changes no result. On quiet cores spinning is faster, and the user's own choice is left alone.
    """
    if "torch" in sys.modules:  # too late
        return
    if os.environ.get("OMP_NUM_THREADS") == "1" or any(name in os.environ for name in _CHOICES):
        return
    busy = psutil.cpu_percent(interval=_SAMPLE_S) / 100 * (psutil.cpu_count() or 1)
    if busy >= _BUSY_CORES:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if os.environ.get("RANK", "0") == "0":
            print(
                f"others keep {busy:.1f} of {psutil.cpu_count()} cores busy: threads sleep while they wait "
                "(OMP_WAIT_POLICY=PASSIVE; set it to ACTIVE for the contrary)",
                file=sys.stderr,
            )
