"""`cocomix export`: any checkpoint as a folder that transformers loads, and what bad input gets."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from model_helpers import small_model
from run_helpers import TORCHRUN, World
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.distributed.export import export, find_model, load_model


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_of_a_run_loads_in_a_process_without_deepspeed(tmp_path, capsys):
    world = World(tmp_path)
    assert world.train("run", "model.mixing=none", "train.zero_stage=2") == 0
    checkpoint = max((tmp_path / "run/checkpoints").glob("step-*"))
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    code = (
        f"import sys, cocomix; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(tmp_path / 'out')!r}); print(m.dtype, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["torch.bfloat16", "False"], done.stderr
    trained, exported = world.weights("run"), load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name].bfloat16()) for name in trained)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("the cat") == (
        AutoTokenizer.from_pretrained(tmp_path / "run/model").encode("the cat")
    )


@pytest.mark.slow
def test_a_stage_3_checkpoint_of_two_ranks_is_exported_by_one(tmp_path):
    world = World(tmp_path)
    world.train_on_two("run", "model.mixing=none", "train.zero_stage=3", launcher=TORCHRUN)
    out = export(tmp_path / "run", tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in world.weights("run").items())
    AutoModelForCausalLM.from_pretrained(out)


def test_fp32_weights_and_logits_are_unchanged(folder, tmp_path):
    out = export(folder, tmp_path / "new/out")
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, out))
    ids = torch.arange(10)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_a_model_in_several_files_stays_whole(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    out = export(tmp_path / "model", tmp_path / "out", "bf16")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["a/x.safetensors", "../secret.safetensors", "/etc/passwd", "..", "", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    small_model().save_pretrained(tmp_path / "model", max_shard_size="4KB")
    path = tmp_path / "model/model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    (tmp_path / "secret.safetensors").write_bytes(next((tmp_path / "model").glob("*.safetensors")).read_bytes())
    with pytest.raises(CocomixError, match="index.json names .*, which is no file of its own folder"):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damage(folder, kind):
    """Damage a model; what the message must say."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    if kind == "missing file":
        file.unlink()
        return "model.safetensors is missing"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
        return "cannot be read"
    if kind == "not finite":
        weights["transformer.wpe.weight"][0, 0] = torch.nan
        message = "not finite, in transformer.wpe.weight"
    elif kind == "missing weight":
        del weights["transformer.wpe.weight"]
        message = "transformer.wpe.weight is missing"
    elif kind == "foreign weight":
        weights["other"] = torch.zeros(3)
        message = "no place for other"
    elif kind == "other shape":
        weights["transformer.wpe.weight"] = torch.zeros(3, 16)
        message = "transformer.wpe.weight has shape [3, 16] and should have [12, 16]"
    else:
        (folder / "config.json").write_text('{"model_type": "nothing"}')
        return "describes no causal language model"
    save_file(weights, file, metadata={"format": "pt"})
    return message


@pytest.mark.parametrize(
    "kind",
    [
        "missing file",
        "truncated",
        "not finite",
        "missing weight",
        "foreign weight",
        "other shape",
        "foreign config",
    ],
)
def test_a_damaged_model_is_refused_and_leaves_nothing(folder, tmp_path, kind):
    message = damage(folder, kind)
    with pytest.raises(CocomixError) as refused:
        export(folder, tmp_path / "out")
    assert message in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_existing_out_and_a_folder_without_a_model_are_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CocomixError, match="exists already"):
        export(folder, tmp_path / "out")
    with pytest.raises(CocomixError, match="holds no model"):
        export(tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_names_that_concepts_get_later_do_not_make_a_folder_damaged(folder, tmp_path):
    (folder / "concept_names.json").write_text('{"2": "old"}')
    out = export(folder, tmp_path / "out")
    (out / "concept_names.json").write_text('{"2": "new", "3": "another"}')
    load_model(out)


@pytest.mark.parametrize("place", ["checkpoints/step-500", "runs/checkpoints/step-500"])
def test_another_programs_model_may_lie_where_a_checkpoint_would(folder, tmp_path, place):
    shutil.copytree(folder, tmp_path / place)
    assert find_model(tmp_path / place) == tmp_path / place
    load_model(tmp_path / place)


def test_a_checkpoint_at_the_root_is_no_run():
    with pytest.raises(CocomixError, match="holds no model"):
        find_model("/step-1")
