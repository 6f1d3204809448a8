"""How the time of a call is read, cold caches included: one thing on a CPU, another on a GPU."""

import os
import time
from pathlib import Path

import torch

_LEAD_PASSES = 4  # over a buffer of several caches' size: about 0.3 ms on an H100, more than a first launch takes
_CACHES = 4  # "cold" means that this many caches' worth of other bytes came in between


def free_cores(most: int = 4) -> int:
    """Cores that nothing else runs on just now, one to `most`: how many threads to use.

    Threads that wait for one another on busy cores take a hundred times as long, which says nothing about the code.
    """
    running = []
    for _ in range(20):
        try:
            running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
        except OSError:
            running.append(1)
        time.sleep(0.01)
    return max(1, min(most, (os.cpu_count() or 1) - sorted(running)[len(running) // 2] + 1))  # one of them is this


def cache_bytes(device: torch.device) -> int:
    """The cache that inputs must not stay in: a GPU's L2, a CPU's last level."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def rotation_budget(device: torch.device) -> int:
    """Bytes that the rotating inputs may take. On a CPU making them costs more time than a warmer cache is worth."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 256 * 2**20


def rotating_sets(set_bytes: int, cache: int, budget: int) -> int:
    """How many input sets to take turns with: several caches' worth, at least two, at most 16 and the budget."""
    wanted = max(2, -(-_CACHES * cache // set_bytes))
    return max(1, min(wanted, 16, budget // set_bytes))


class Clock:
    """Seconds of one call, as the device spends them.

    On a GPU the time between two events on the stream. The host waits for an idle GPU, queues passes over a buffer of
    several caches' size and only then the first event: so the cache is cold, the call's first launch is hidden as it
    is in training, where the queue is never empty, and neither synchronisation nor Python before the call counts.
    Where the GPU has to wait for the host within the call, that does count. On a CPU plain wall-clock time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.lead = torch.ones(_CACHES * cache_bytes(device) // 4, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, function) -> float:
        """Time of `function()`, whose result is thrown away."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            result = function()
            elapsed = time.perf_counter() - start
            del result  # giving memory back is not part of the call
            return elapsed
        torch.cuda.synchronize(self.device)
        for _ in range(_LEAD_PASSES):
            self.lead.sum()
        self.start.record()
        result = function()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) / 1e3
