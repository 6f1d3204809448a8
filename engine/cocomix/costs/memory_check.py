"""Before the first step: whether the GPUs have the memory that the config's plan needs, and what would fit if not."""

import dataclasses

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.costs.cluster import Cluster
from cocomix.costs.planner import Job, choose, configured, divisors, make_job, predict, settings_of, what_would_fit


def memory_warning(config: Config, vocab_size: int, world: int, memory_bytes: int) -> str | None:
    """What to tell the user, in one line, where a step of `config` on `world` GPUs of `memory_bytes` bytes each is
    predicted not to fit; None where it fits, or where nothing can be predicted (a teacher of unknown shape, or input
    that training itself refuses). Arithmetic only; takes milliseconds.
    """
    try:
        job = make_job(config, Cluster(memory_gb=round(memory_bytes / 1e9, 1)), vocab_size)
        planned = configured(job, world)
    except CocomixError:
        return None
    if planned.fits:
        return None
    needed, reserved = planned.memory.total / 1e9, job.cluster.reserved_gb
    return (
        f"the GPU's memory will probably not suffice: a step is predicted to need {needed:.1f} GB (fullest moment: "
        f"{planned.memory.moment}), and of the GPU's {memory_bytes / 1e9:.1f} GB the driver and the libraries take "
        f"about {reserved:g} GB. {_advice(job, planned, world)}"
    )


def _advice(job, planned, world):
    """Single changes that would do, else the fastest setup that would, else what would need more than these GPUs."""
    single = [f"{change} ({found.memory.total / 1e9:.1f} GB)" for change, found in _single_changes(job, planned)]
    if single:
        return f"What would fit: {', or '.join(single)}"
    global_batch = job.config.train.global_batch
    found = choose(job, world, global_batch)
    if found is not None:
        return f"What would fit: {settings_of(found)} ({found.memory.total / 1e9:.1f} GB)"
    advice = what_would_fit(job, world, global_batch)
    return advice[0].upper() + advice[1:]


def _single_changes(job: Job, planned):
    """One change each that makes the step fit, with its prediction: the largest smaller micro batch, activation
    checkpointing, the lowest higher stage, the optimizer in host memory."""
    setup = planned.setup
    windows = setup.micro_batch * setup.rounds
    kinds = [
        [
            (f"train.micro_batch={size}", {"micro_batch": size, "rounds": windows // size})
            for size in reversed(divisors(windows))
            if size < setup.micro_batch
        ],
        [("train.activation_checkpointing=true", {"checkpointing": True})],
        [(f"train.zero_stage={stage}", {"stage": stage}) for stage in range(setup.stage + 1, 4)],
        [("train.offload_optimizer=true", {"offload": True})],
    ]
    for kind in kinds:
        for text, change in kind:
            found = predict(job, dataclasses.replace(setup, **change))
            if found.fits and found.offered:
                yield text, found
                break
