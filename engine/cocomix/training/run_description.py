"""The record of a run that is about to train."""

import dataclasses
import importlib.metadata
from pathlib import Path

import torch

from cocomix.core.config import Config
from cocomix.core.flops import training_flops
from cocomix.core.methods import CONCEPT_LABELS, SOFT_TARGETS
from cocomix.core.shapes import student_shape
from cocomix.data.token_files import TokenFiles
from cocomix.distributed.ranks import Ranks
from cocomix.teacher.supervision import Supervision
from cocomix.training.run_places import fingerprints_of, places_of
from cocomix.training.run_record import DataRecord, RunRecord, new_id


def describe_run(
    config: Config,
    tokens: TokenFiles,
    supervision: Supervision,
    ranks: Ranks,
    n_parameters: int,
    fingerprints: dict[str, str] | None = None,
) -> RunRecord:
    """What the run says of itself, as one that begins; `n_parameters` counts the student's, on all ranks together;
    `fingerprints` are those of `supervision`, where they are known."""
    of_labels = f"the {CONCEPT_LABELS}' "
    return RunRecord(
        name=Path(config.train.run).name,
        method=config.model.mixing,
        concept_labels=supervision.kind(CONCEPT_LABELS),
        soft_targets=supervision.kind(SOFT_TARGETS),
        device=_device_name(ranks.device),
        world_size=ranks.world,
        parameters=n_parameters,
        tokens_per_step=config.tokens_per_step,
        total_steps=config.total_steps,
        seq_len=config.data.seq_len,
        flops_per_token=training_flops(student_shape(config, tokens.vocab_size), supervision.teacher_shape),
        versions={name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "cocomix")},
        config=dataclasses.asdict(config),
        supervision_flops_per_token=supervision.flops_per_token(config.data.seq_len),
        data=DataRecord(
            vocab_size=tokens.vocab_size,
            train_tokens=tokens.split("train").n_tokens,
            val_tokens=tokens.split("val").n_tokens,
            val_unigram_perplexity=tokens.meta.val_unigram_perplexity,
            fingerprints=fingerprints_of(tokens),
        ),
        id=new_id(),
        paths=places_of(config),
        teacher_fingerprints={
            name.removeprefix(of_labels): value
            for name, value in (fingerprints or {}).items()
            if name.startswith(of_labels)
        },
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
