"""The warning before the first step, with pretended GPUs."""

import re
import time
from pathlib import Path

import pytest

from cocomix.core.config import load_config
from cocomix.costs.cluster import Cluster
from cocomix.costs.memory_check import memory_warning
from cocomix.costs.planner import configured, make_job

CONFIGS = Path(__file__).parents[3] / "configs/openwebtext"
VOCABULARY = 50257
GB = 10**9


def warn(size, world, gigabytes, *overrides):
    return memory_warning(
        load_config(CONFIGS / f"{size}.yaml", list(overrides)), VOCABULARY, world, int(gigabytes * GB)
    )


def test_it_warns_exactly_where_the_plan_does_not_fit():
    config = load_config(CONFIGS / "386m.yaml", [])
    needed = configured(make_job(config, Cluster(), VOCABULARY), 8).memory.total / GB + Cluster().reserved_gb
    assert warn("386m", 8, needed + 0.2) is None
    message = warn("386m", 8, needed - 0.2)
    assert f"a step is predicted to need {needed - 3:.1f} GB" in message and "\n" not in message
    assert f"of the GPU's {needed - 0.2:.1f} GB" in message


@pytest.mark.parametrize(
    ("size", "world", "gigabytes", "overrides", "kinds"),
    [
        ("386m", 8, 40, ["train.micro_batch=64"], {"micro_batch", "activation_checkpointing"}),
        (
            "1.38b",
            8,
            None,
            ["train.zero_stage=1", "train.micro_batch=2"],
            {"micro_batch", "activation_checkpointing", "zero_stage", "offload_optimizer"},
        ),
        ("1.38b", 1, 24, ["train.micro_batch=1"], {"offload_optimizer"}),
        (
            "386m",
            8,
            20,
            ["train.micro_batch=64", "train.precision=fp32", "train.activation_checkpointing=true"],
            {"micro_batch"},
        ),  # from one micro batch a step to several, which keep gradients in between
        ("69m", 2, 8, ["train.precision=fp32", "train.zero_stage=0"], {"micro_batch"}),
    ],
)
def test_every_change_that_it_names_fits_and_the_next_weaker_one_does_not(size, world, gigabytes, overrides, kinds):
    if gigabytes is None:  # not quite enough
        gigabytes = max(number for number in range(5, 80) if warn(size, world, number, *overrides))
    message = warn(size, world, gigabytes, *overrides)
    found = re.findall(r"train\.(\w+)=(\w+) \(([\d.]+) GB\)", message)
    named = {key: value for key, value, _ in found}
    assert set(named) == kinds
    for key, value, predicted in found:
        change = f"train.{key}={value}"
        assert warn(size, world, gigabytes, *overrides, change) is None, key
        config = load_config(CONFIGS / f"{size}.yaml", [*overrides, change])
        assert predicted == f"{configured(make_job(config, Cluster(), VOCABULARY), world).memory.total / GB:.1f}"
    if "micro_batch" in named:
        larger = 2 * int(named["micro_batch"])
        assert warn(size, world, gigabytes, *overrides, f"train.micro_batch={larger}") is not None


def test_where_no_single_change_is_enough_it_names_all_that_are_needed():
    for gigabytes in range(79, 4, -1):
        message = warn("1.38b", 8, gigabytes, "train.precision=fp32", "train.zero_stage=0", "train.micro_batch=128")
        if len(re.findall(r"train\.\w+=\w+", message)) == 3 and "Nothing fits" not in message:
            break
    changes = re.findall(r"train\.\w+=\w+", message)
    assert len(changes) == 3
    assert warn("1.38b", 8, gigabytes, "train.precision=fp32", *changes) is None


def test_where_nothing_fits_it_names_more_gpus_or_a_smaller_model():
    assert re.search(r"Nothing fits into 15 GB less 3 GB reserved.*or 8 GPUs with train", warn("1.38b", 1, 15))
    assert warn("69m", 1, 2).endswith("what would fit: a smaller model, context or concept_dim")


def test_what_cannot_be_predicted_is_left_to_training():
    assert warn("69m", 3, 1) is None  # the batch does not divide
    assert warn("69m", 1, 1, "concept_labels.cache=null", "teacher.model=someone/else") is None
    assert "predicted to need" in warn("69m", 1, 1, "concept_labels.cache=null")


def test_it_is_quick():
    start = time.perf_counter()
    warn("1.38b", 1, 15)  # the longest way through
    assert time.perf_counter() - start < 0.5
