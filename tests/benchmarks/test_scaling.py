"""`benchmarks/scaling.py`: where measuring ends and prediction goes on, what a prediction is, and the picture."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from profile_helpers import profile_results

from cocomix.core.config import load_config
from cocomix.core.errors import CocomixError
from cocomix.costs.cluster import Cluster
from cocomix.costs.planner import configured, make_job

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the benchmarks are programs, not part of the package
import scaling  # noqa: E402

CPU = torch.device("cpu")
CONFIG = """
out: OUT
data: {folder: "${out}/data", seq_len: 32}
model: {n_embd: 64, n_layer: 4, n_head: 4, concept_dim: 256, concept_topk: 8, insert_layer: 1}
teacher: {label_topk: 3}
train: {global_batch: 8, micro_batch: 2, warmup_steps: 3, tensorboard: false, timeout_minutes: 1, precision: fp32}
deepspeed: {zero_optimization: {reduce_bucket_size: 1000000}}
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("OUT", str(tmp_path)))
    return tmp_path / "config.yaml"


def profile(tokens_per_s=100.0):
    return profile_results(tokens_per_s, product_flops_per_s=2e11)


def finished(returncode=0, stderr="", written=None):
    """In place of subprocess.run: a profile that ends so."""

    def run(command, **_):
        if written is not None:
            Path(command[command.index("--json") + 1]).write_text(json.dumps(written.as_json()))
        finished.command = command
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    return run


def options_of(config_file, *arguments):
    return scaling.parse([str(config_file), *arguments])


def test_measuring_ends_where_memory_does_and_prediction_goes_on(config_file, monkeypatch):
    asked = []

    def run_profile(name, value, *_):
        asked.append((name, value))
        return profile(100 * value) if value < 4 else None

    monkeypatch.setattr(scaling, "run_profile", run_profile)
    options = options_of(config_file, "--batch", "8,1,2,4", "--beyond", "1")
    points = scaling.scale(load_config(config_file), options)["dimensions"]["batch"]
    assert asked == [("batch", 1), ("batch", 2), ("batch", 4)]
    assert [(point["value"], point["reason"]) for point in points] == [
        (1, None),
        (2, None),
        (4, "out of memory"),
        (8, "out of memory"),
        (16, "predicted alone"),
    ]
    assert [point["measured"] and point["measured"]["ntp"]["tokens_per_s"] for point in points] == [
        100,
        200,
        None,
        None,
        None,
    ]
    assert all(point["predicted"]["cached"]["tokens_per_s"] > 0 for point in points)


def test_ranks_end_with_the_devices(config_file, monkeypatch):
    monkeypatch.setattr(scaling, "run_profile", lambda *_: profile())
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 2)
    found = scaling.measure("ranks", options_of(config_file, "--ranks", "1,2,4"), load_config(config_file), CPU)
    assert [(value, one is not None, reason) for value, (one, reason) in found.items()] == [
        (1, True, None),
        (2, True, None),
        (4, False, "only 2 devices are here"),
    ]


@pytest.mark.parametrize(
    ("name", "value", "ranks", "expected"),
    [
        ("batch", 3, 1, {"train.micro_batch=3", "train.global_batch=9"}),
        ("seq_len", 64, 1, {"data.seq_len=64", "train.global_batch=8"}),
        ("concepts", 512, 1, {"model.concept_dim=512", "train.global_batch=8"}),
        ("ranks", 3, 3, {"train.global_batch=12"}),
    ],
)
def test_a_point_is_profiled_and_predicted_at_the_same_settings(config_file, monkeypatch, name, value, ranks, expected):
    monkeypatch.setattr(scaling.subprocess, "run", finished(written=profile()))
    config = load_config(config_file)
    options = options_of(config_file, "--batch", "1", "--vocab-size", "512", "--rounds", "7")
    assert scaling.run_profile(name, value, options, config) == profile()
    command = finished.command
    settings = {part for part in command if "=" in part}
    assert settings == expected and ("torch.distributed.run" in command) == (ranks > 1)
    assert ranks == 1 or command[command.index("--nproc-per-node") + 1] == str(ranks)
    assert command[command.index("--rounds") + 1] == "7" and command[command.index("--labels") + 1] == "cached"
    there = load_config(config_file, sorted(settings) + ["concept_labels.cache=cached"])
    assert scaling.at(config, name, value) == there


def test_running_out_of_memory_is_told_from_other_failures(config_file, monkeypatch):
    options, config = options_of(config_file, "--batch", "1"), load_config(config_file)
    monkeypatch.setattr(scaling.subprocess, "run", finished(2, "cocomix: ntp does not fit into memory with micro"))
    assert scaling.run_profile("batch", 1, options, config) is None
    monkeypatch.setattr(scaling.subprocess, "run", finished(-9))
    assert scaling.run_profile("batch", 1, options, config) is None
    monkeypatch.setattr(scaling.subprocess, "run", finished(2, "cocomix: there are no token files"))
    with pytest.raises(CocomixError, match="failed at batch 1: cocomix: there are no token files"):
        scaling.run_profile("batch", 1, options, config)
    monkeypatch.setattr(scaling, "run_profile", lambda *_: None)
    with pytest.raises(CocomixError, match="not even the smallest value fits"):
        scaling.scale(config, options)


def test_predictions_are_those_of_the_planner_at_the_measured_rate(config_file):
    config = load_config(config_file, ["concept_labels.cache=cached"])
    cluster = scaling.cluster_of(profile(), CPU)
    assert cluster.product_tflops == cluster.fp32_tflops == cluster.attention_tflops == pytest.approx(0.2)
    assert 1e9 < cluster.memory_tb_s * 1e12 < 2e12
    cluster = Cluster(fp32_tflops=0.2, attention_tflops=0.2, memory_tb_s=0.02, launch_us=0.0)
    found = scaling.prediction(config, 2, cluster, 512, CPU)
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, mixing="none"))
    for name, one in (("ntp", plain), ("cached", config)):
        assert found[name]["tokens_per_s"] == configured(make_job(one, cluster, 512), 2).tokens_per_s
    assert found["ratio"]["median"] == found["ntp"]["tokens_per_s"] / found["cached"]["tokens_per_s"] > 1
    faster = scaling.prediction(config, 2, dataclasses.replace(cluster, fp32_tflops=0.4), 512, CPU)
    assert faster["ntp"]["tokens_per_s"] > found["ntp"]["tokens_per_s"]


def test_measured_points_are_solid_and_predicted_ones_hollow(config_file, monkeypatch):
    monkeypatch.setattr(scaling, "run_profile", lambda name, value, *_: profile(100 * value) if value < 4 else None)
    found = scaling.scale(load_config(config_file), options_of(config_file, "--batch", "1,2,4"))
    points = found["dimensions"]["batch"]
    figure = scaling.picture("windows", points)
    speed, ratio, memory = figure.axes
    predicted, measured = speed.lines[:2]
    assert list(predicted.get_xdata()) == [1, 2, 4, 8, 16] and predicted.get_markerfacecolor() == "white"
    assert predicted.get_linestyle() == "--" and measured.get_linestyle() == "-"
    assert list(measured.get_xdata()) == [1, 2] and list(measured.get_ydata()) == [100, 200]
    assert measured.get_markerfacecolor() == measured.get_color()
    assert list(ratio.lines[1].get_ydata()) == [1.6, 1.6] and list(memory.lines[3].get_ydata()) == [0.8, 0.8]
    text = scaling.table(found)
    assert "out of memory" in text and "200 / " in text and "- / " in text


def test_bad_values_are_refused(config_file, capsys):
    for arguments in ((), ("--batch", "0"), ("--batch", "two")):
        with pytest.raises(SystemExit, match="2"):
            options_of(config_file, *arguments)
    assert scaling.main([str(config_file), "--batch", "1", "model.n_embdd=3"]) == 2
    assert "n_embdd" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_measures_predicts_and_draws(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "scaling"
    assert (
        scaling.main(
            [
                str(config_file),
                "--batch",
                "1",
                "--ranks",
                "2",
                "--vocab-size",
                "512",
                "--rounds",
                "1",
                "--out",
                str(out),
            ]
        )
        == 0
    ), capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"scaling.json", "scaling_batch.png", "scaling_ranks.png"}
    found = json.loads((out / "scaling.json").read_text())
    for points in found["dimensions"].values():
        assert [bool(point["measured"]) for point in points] == [True, False, False]
        assert points[0]["measured"]["ratio"]["median"] > 0 and points[0]["measured"]["cached"]["tokens_per_s"] > 0
    assert found["cluster"]["fp32_tflops"] > 0 and found["assumed"]
    assert f"written: {out}" in capsys.readouterr().out
