"""`auto` as a precision: what the machine decides, what an earlier start decided, and what is said of it."""

import pytest
import torch

from cocomix.core.config import Config, TrainConfig, load_config
from cocomix.core.errors import CocomixError
from cocomix.core.precision import fastest, settled


def auto() -> Config:
    config = Config()
    config.train.precision = config.teacher.dtype = "auto"
    return config


@pytest.mark.parametrize(
    ("capabilities", "expected", "why"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bf16", "AMX"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bf16", "AVX512-BF16"),
        ({"amx_bf16": False, "avx512_bf16": False}, "fp32", "does not multiply bf16"),
        ({"neon": True}, "fp32", "does not multiply bf16"),
    ],
)
def test_a_cpu_takes_what_it_multiplies_in_hardware(monkeypatch, capabilities, expected, why):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fastest("cpu")[0] == expected and why in fastest("cpu")[1]
    config, notes = settled(auto(), "cpu")
    assert (config.train.precision, config.teacher.dtype) == (expected, expected)
    assert all(note.startswith(f"{name}=auto: {expected}, since") for name, note in notes.items())


def test_an_older_pytorch_is_asked_otherwise(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert fastest("cpu")[0] == expected


def test_a_gpu_takes_bf16():
    assert fastest("cuda")[0] == "bf16"


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_what_is_continued_keeps_what_it_began_with(monkeypatch, began):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": began == "fp32"})
    config, notes = settled(auto(), "cpu", lambda _: {"train.precision": began, "teacher.dtype": began})
    assert (config.train.precision, config.teacher.dtype) == (began, began)
    assert "began with it" in notes["train.precision"] and "began with it" in notes["teacher.dtype"]


def test_stage_0_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    config = auto()
    config.train.zero_stage = 0
    found, notes = settled(config, "cpu")
    assert (found.train.precision, found.teacher.dtype) == ("fp32", "bf16") and "stage 0" in notes["train.precision"]


def test_what_is_named_stays_and_nothing_is_asked_for_it():
    def never(_):
        raise AssertionError("nothing is auto")

    config = Config(train=TrainConfig(precision="bf16"))
    assert settled(config, "cpu", never) == (config, {})


def test_only_known_precisions_are_taken(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {precision: auto}\nteacher: {dtype: auto}\n")
    assert load_config(tmp_path / "c.yaml").train.precision == "auto"
    for setting in ("train.precision", "teacher.dtype"):
        with pytest.raises(CocomixError, match="must be one of fp32, bf16, auto"):
            load_config(tmp_path / "c.yaml", [f"{setting}=fp8"])
