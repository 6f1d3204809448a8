import dataclasses

import pytest
import torch
from run_helpers import SEQ_LEN, STEPS

from cocomix.data.token_files import TokenFiles
from cocomix.distributed.ranks import Ranks
from cocomix.teacher.supervision import Supervision
from cocomix.training.run_description import describe_run
from cocomix.training.run_record import Place

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "sources"),
    [
        ([], ("online", None)),
        (["labels.cache=OUT/labels", "distillation.weight=0.2"], ("cached", "online")),
        (["model.mixing=none"], (None, None)),
    ],
)
def test_a_run_says_what_it_trains_and_from_what(world, overrides, sources):
    config = world.load(*(text.replace("OUT", str(world.folder)) for text in overrides))
    tokens = TokenFiles.open(config.data.folder)
    record = describe_run(config, tokens, Supervision.from_config(config, tokens, CPU), Ranks(0, 2, CPU), 1234)
    assert (record.name, record.method, record.world_size, record.parameters) == ("run", config.model.mixing, 2, 1234)
    assert (record.concept_labels, record.soft_targets) == sources
    assert (record.total_steps, record.tokens_per_step, record.seq_len) == (STEPS, 8 * SEQ_LEN, SEQ_LEN)
    assert record.device == f"CPU, {torch.get_num_threads()} threads"
    assert record.data.vocab_size == tokens.vocab_size and record.data.train_tokens == tokens.split("train").n_tokens
    assert record.data.fingerprints == {name: tokens.split(name).fingerprint for name in ("train", "val")}
    assert record.paths["data.folder"] == Place("../data", str(world.folder / "data"))
    assert record.id and not record.teacher_fingerprints
    assert record.config == dataclasses.asdict(config) and set(record.versions) == {"torch", "deepspeed", "cocomix"}
    assert record.flops_per_token > 6 * 12 * 3 * 32**2  # three blocks' weights, twice forward and four times backward
