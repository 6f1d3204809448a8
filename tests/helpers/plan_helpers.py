"""What the planner's tests measure, run as a program under torchrun or alone: a tiny student in DeepSpeed's engine.

    python plan_helpers.py '[[STAGE, PRECISION, ROUNDS, MIXING, {ZERO_SETTINGS}], ...]'

prints one JSON list with an object for each case: the collectives of a step as DeepSpeed's comms logger records them,
and the bytes of the tensors that the step held at most. Many cases share a process, since starting one takes longest.
"""

import gc
import json
import sys

import numpy as np
import torch

from cocomix.core.shapes import StudentShape

SHAPE = {"n_embd": 64, "n_layer": 4, "insert_layer": 1, "vocab_size": 1500, "concept_dim": 1024, "concept_topk": 4}
N_HEAD, SEQ_LEN, MICRO_BATCH, STEPS = 4, 64, 2, 2
SCALAR = 8  # bytes: norms and flags


def shape(mixing: str, seq_len: int = SEQ_LEN, **more) -> StudentShape:
    """The tiny student's shape."""
    return StudentShape(**{**SHAPE, **more}, seq_len=seq_len, mixing=mixing)


def build(student: StudentShape):
    """A model of this shape, in training mode."""
    from cocomix.model.config import CoCoMixConfig
    from cocomix.model.model import CoCoMixForCausalLM

    settings = {**student.__dict__, "n_positions": student.seq_len}
    del settings["seq_len"]
    torch.manual_seed(0)
    return CoCoMixForCausalLM(CoCoMixConfig(**settings, n_head=N_HEAD)).train()


def micro_batch(student: StudentShape, rows: int) -> dict:
    """Random arguments of the model's forward pass."""
    ids = torch.randint(student.vocab_size, (rows, student.seq_len))
    labels = torch.randint(student.concept_dim, (rows, student.seq_len, 3))
    return {"input_ids": ids, "labels": ids, "concept_labels": labels}


def peak_above_start(step) -> int:
    """The most bytes that tensors took during `step()` above those before it."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([0] + [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def living_storages() -> dict[int, int]:
    """Bytes of every tensor storage that Python can reach, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def main(cases: list) -> None:
    """Measure every case, one after the other."""
    from cocomix.distributed.ranks import process_group

    torch.set_num_threads(1)
    with process_group(2) as ranks:
        found = [measure(ranks, *case) for case in cases]
        if ranks.is_first:
            print(json.dumps(found))


def measure(ranks, stage: int, precision: str, rounds: int, mixing: str, zero: dict) -> dict:
    """Two steps to warm up, then measured ones."""
    from cocomix.core.config import Config
    from cocomix.distributed.ranks import import_deepspeed
    from cocomix.training.deepspeed_engine import deepspeed_config

    before = living_storages()
    config = Config()
    config.train.zero_stage, config.train.precision = stage, precision
    config.train.micro_batch, config.train.global_batch = MICRO_BATCH, MICRO_BATCH * rounds * ranks.world
    config.deepspeed = {"comms_logger": {"enabled": True, "prof_all": True}, "zero_optimization": zero}
    student = shape(mixing)
    model = build(student)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = import_deepspeed().initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, ranks.world)
    )

    def step():
        for _ in range(rounds):
            engine.backward(engine(**micro_batch(student, MICRO_BATCH)).loss)
            engine.step()

    collectives = measured_collectives(step)
    resident = sum(size for address, size in living_storages().items() if address not in before)
    peak = resident + peak_above_start(step)
    engine.destroy()
    return {"collectives": collectives, "peak": peak}


def measured_collectives(step) -> dict[str, int]:
    """Bytes of a step by collective, without scalars."""
    from deepspeed.comm.comm import comms_logger

    step(), step()
    comms_logger.reset_data()
    for _ in range(STEPS):
        step()
    return {
        name: sum(size * found[0] for size, found in sizes.items() if size > SCALAR) / STEPS
        for name, sizes in comms_logger.get_raw_data().items()
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
