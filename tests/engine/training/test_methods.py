"""The methods that CoCoMix is compared with, each in the trainer against its naive version: pause tokens, concept
prediction without mixing, knowledge distillation, and labels by activation."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_helpers import naive_student
from run_helpers import (
    SEQ_LEN,
    World,
    assert_equal_runs,
    labelled_world,
    make_labels,
    reference_run,
    stage,
    stop_at,
)
from stored_json import change_json
from transformers import AutoModelForCausalLM

from cocomix import ConceptTeacher, SparseAutoencoder
from cocomix.cli import main
from cocomix.core.methods import MIXING, doubles_sequence, method_title, mixes_concepts, predicts_concepts
from cocomix.report.report import comparison_table
from cocomix.report.runs import load_run
from cocomix.training.trainer import EXIT_RESUME

WEIGHT, TOP = 0.3, 5
DISTILLED = ["model.mixing=none", f"distillation.weight={WEIGHT}", f"distillation.top_k={TOP}"]
WHOLE = ["model.mixing=none", f"distillation.weight={WEIGHT}", "distillation.top_k=null"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Text, teacher, SAE, label caches by attribution and by activation, and soft targets."""
    made = labelled_world(tmp_path_factory.mktemp("methods"))
    make_labels(made.load(f"concept_labels.cache={made.folder}/active", "teacher.labels_by=activation"))
    make_labels(made.load(*DISTILLED, f"distillation.cache={made.folder}/soft"))
    return made


def labels(world: World) -> str:
    return f"concept_labels.cache={world.folder}/labels"


def soft(world: World) -> str:
    return f"distillation.cache={world.folder}/soft"


# ---- naive versions


def naive_loss(world, config, top=None, whole=False):
    """A function with the loss of a batch: the naive student, and the naive KL where there are soft targets."""
    teacher = AutoModelForCausalLM.from_pretrained(world.folder / "teacher").eval()

    def loss_of(model, ids, concept_labels):
        parameters = dict(model.named_parameters())
        logits, loss, concept_loss = naive_student(parameters, model.config, ids, concept_labels)
        if concept_loss is not None:
            loss = loss + config.model.concept_loss_weight * concept_loss
        if top or whole:
            with torch.no_grad():
                of_teacher = teacher(ids).logits[:, :-1].flatten(0, 1)
            loss = loss + WEIGHT * naive_kl(of_teacher, logits[:, :-1].flatten(0, 1), top)
        return loss

    return loss_of


def naive_kl(teacher_logits, logits, top):
    """Mean KL(teacher || student) over rows of logits [N, V]; with `top`, of that many likeliest tokens and the rest
    as one more."""
    p, q = teacher_logits.softmax(-1), logits.softmax(-1)
    if top is not None:
        likeliest = p.topk(top, dim=-1).indices
        p, q = (
            torch.cat([x.gather(-1, likeliest), 1 - x.gather(-1, likeliest).sum(-1, keepdim=True)], dim=-1)
            for x in (p, q)
        )
    return F.kl_div(q.log(), p, reduction="batchmean")


METHODS = {
    "pause": ("model.mixing=pause",),
    "residual": ("model.concept_residual=true", labels),
    "paused residual": ("model.mixing=pause", "model.concept_residual=true"),
    "spaced": ("model.concept_every=3", "model.concept_residual=true", labels),
    "predict": ("model.mixing=predict", labels),
    "distilled online": (*DISTILLED,),
    "distilled cached": (*DISTILLED, soft),
    "distilled whole": (*WHOLE,),
    "distilled CoCoMix": (f"distillation.weight={WEIGHT}", f"distillation.top_k={TOP}", labels, soft),
}


@pytest.mark.parametrize(
    ("method", "zero"),
    [
        *((method, 1) for method in METHODS),
        ("pause", 3),
        ("residual", 3),
        ("spaced", 3),
        ("predict", 3),
        ("distilled whole", 0),
        ("distilled whole", 2),
        ("distilled whole", 3),
        ("distilled cached", 3),
    ],
)
def test_every_method_follows_its_naive_version_in_plain_pytorch(world, method, zero):
    overrides = [item if isinstance(item, str) else item(world) for item in METHODS[method]]
    config = world.load(*overrides)
    run = f"{method}-{zero}"
    assert world.train(run, *overrides, *stage(zero)) == 0
    distils = "distilled" in method
    losses, _, _, weights = reference_run(
        world,
        *overrides,
        loss_of=naive_loss(
            world, config, top=TOP if distils and "whole" not in method else None, whole="whole" in method
        ),
    )
    np.testing.assert_allclose(world.losses(run), losses, rtol=3e-4)
    for name, tensor in world.weights(run).items():
        torch.testing.assert_close(
            tensor, weights[name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    record = world.records(run)[0]
    assert (record["concept_loss"] is not None) == predicts_concepts(config.model.mixing)
    assert ("distillation_loss" in record) == distils
    if distils:
        parts = record["ntp_loss"] + WEIGHT * record["distillation_loss"] + 0.1 * (record["concept_loss"] or 0)
        assert record["loss"] == pytest.approx(parts, rel=1e-5) and record["distillation_loss"] > 0


@pytest.mark.slow
def test_every_method_trains_alike_on_two_processes(world):
    methods = {
        name: [item if isinstance(item, str) else item(world) for item in overrides]
        for name, overrides in METHODS.items()
    }
    runs = {
        f"{name}-on-two-{zero}": [*methods[name], *stage(zero), "train.micro_batch=2"]
        for name in ("pause", "residual", "spaced", "predict", "distilled whole", "distilled CoCoMix")
        for zero in (1, 3)
    }
    world.train_on(2, runs)
    for run in runs:
        name = run.split("-on-two")[0]
        alone = f"{name}-alone"
        if not (world.folder / alone).exists():  # for both stages
            assert world.train(alone, *methods[name]) == 0
        for key in ("loss", "ntp_loss"):
            np.testing.assert_allclose(world.losses(run, key), world.losses(alone, key), rtol=1e-4)


@pytest.mark.parametrize("method", ["pause", "residual", "spaced", "predict", "distilled cached", "distilled whole"])
def test_bf16_stays_near_fp32(world, method):
    overrides = [item if isinstance(item, str) else item(world) for item in METHODS[method]]
    assert world.train(f"{method}-fp32", *overrides) == 0
    assert (
        world.train(
            f"{method}-bf16",
            *overrides,
            "train.precision=bf16",
            "teacher.dtype=" + ("bf16" if method == "distilled whole" else "fp32"),
            "train.activation_checkpointing=true",
        )
        == 0
    )
    np.testing.assert_allclose(world.losses(f"{method}-bf16"), world.losses(f"{method}-fp32"), rtol=0.01)


# ---- labels by activation


@pytest.mark.parametrize("bias", [0.0, -1.5])
def test_labels_by_activation_are_the_largest_latents_of_a_dense_encoder(world, bias):
    config = world.load("teacher.labels_by=activation", "teacher.label_topk=6")
    teacher = ConceptTeacher.from_config(config.teacher, torch.device("cpu"))
    teacher.sae.latent_bias += bias
    ids = torch.randint(300, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(world.folder / "teacher").eval()
    sae = SparseAutoencoder.load(world.folder / "sae")
    with torch.no_grad():
        x = _after(model, ids, config.teacher.layer)
    normal = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    latents = (normal - sae.pre_bias) @ sae.W_enc.T + sae.latent_bias + bias
    values, expected = latents.sort(dim=-1, descending=True, stable=True)
    expected = torch.where((values > 0) & (torch.arange(latents.shape[-1]) < sae.k), expected, -1)[..., :6]
    found = teacher.labels(ids)
    assert found.shape == (3, SEQ_LEN, 6) and (found[..., sae.k :] == -1).all()
    assert torch.equal(found, expected) and (found[:, -1, 0] >= 0).any()
    assert (found[..., : sae.k] == -1).any() == (bias < 0)


def _after(model, ids, layer):
    """The output of block `layer`, before the final norm."""
    found = []
    handle = model.transformer.h[layer].register_forward_hook(lambda _m, _a, out: found.append(out))
    model(ids)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


def test_labels_by_activation_train_alike_from_the_cache_and_online(world):
    by = "teacher.labels_by=activation"
    assert world.train("active-online", by) == 0
    assert world.train("active-cached", by, f"concept_labels.cache={world.folder}/active") == 0
    assert_equal_runs(world, "active-online", "active-cached")
    assert world.train("by-attribution") == 0
    assert world.losses("active-online", "concept_loss") != world.losses("by-attribution", "concept_loss")


def test_a_cache_of_another_rule_is_refused(world, capsys):
    assert world.train("refused", "teacher.labels_by=activation", labels(world)) == 2
    assert "was made from labels picked by another rule" in capsys.readouterr().err
    assert world.train("refused", "teacher.labels_by=activation", labels(world), "teacher.model=null") == 2
    assert "was made from labels picked by another rule" in capsys.readouterr().err  # where no teacher tells either
    assert world.train("refused", f"concept_labels.cache={world.folder}/active") == 2
    assert "was made from labels picked by another rule" in capsys.readouterr().err


# ---- what runs leave


def test_soft_targets_train_alike_from_the_cache_and_online(world):
    assert world.train("soft-online", *DISTILLED) == 0
    assert world.train("soft-cached", *DISTILLED, soft(world)) == 0
    assert_equal_runs(world, "soft-online", "soft-cached")
    assert world.losses("soft-online", "distillation_loss") == world.losses("soft-cached", "distillation_loss")


def test_a_distilled_run_goes_on_bit_for_bit(world, monkeypatch):
    assert world.train("soft-whole", *WHOLE) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert world.train("soft-resumed", *WHOLE) == EXIT_RESUME
    assert world.train("soft-resumed", *WHOLE, resume=True) == 0
    assert_equal_runs(world, "soft-whole", "soft-resumed")


def test_a_residual_run_goes_on_bit_for_bit_and_is_used_like_any_other(world, monkeypatch, capsys):
    residual = ["model.concept_residual=true", labels(world)]
    assert world.train("residual-whole", *residual) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert world.train("residual-resumed", *residual) == EXIT_RESUME
    assert world.train("residual-resumed", labels(world), resume=True) == 2
    assert "model.concept_residual was True and is False" in capsys.readouterr().err
    assert world.train("residual-resumed", *residual, resume=True) == 0
    assert_equal_runs(world, "residual-whole", "residual-resumed")
    run, out = world.folder / "residual-whole", world.folder / "residual-exported"
    assert main(["export", str(run), str(out)]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.concept_residual
    assert main(["eval", str(out), "--data", str(world.folder / "data")]) == 0
    assert main(["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "4", "--steer", "3=2.0"]) == 0
    assert main(["concepts", str(run), "--text", "the cat", "--out", str(out / "concepts.html")]) == 0


def test_a_run_with_fewer_concepts_than_tokens_is_used_like_any_other(world, monkeypatch, capsys):
    spaced = ["model.concept_every=3", labels(world)]
    assert world.train("spaced-whole", *spaced) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert world.train("spaced-resumed", *spaced) == EXIT_RESUME
    assert world.train("spaced-resumed", labels(world), resume=True) == 2
    assert "model.concept_every was 3 and is 1" in capsys.readouterr().err
    assert world.train("spaced-resumed", *spaced, resume=True) == 0
    assert_equal_runs(world, "spaced-whole", "spaced-resumed")
    run, out = world.folder / "spaced-whole", world.folder / "spaced-exported"
    assert main(["export", str(run), str(out)]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.concept_every == 3
    assert main(["eval", str(out), "--data", str(world.folder / "data")]) == 0
    # one token at a time, most of which have no concept to steer
    assert main(["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "7", "--steer", "3=force:9"]) == 0
    capsys.readouterr()
    assert main(["concepts", str(run), "--text", "the cat", "--out", str(out / "concepts.html")]) == 0
    assert re.search(r"\d+ tokens of text, \d+ of them with concepts", capsys.readouterr().out)
    assert (out / "concepts.html").exists()


def test_another_weight_is_another_run(world, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert world.train("weight", *WHOLE) == EXIT_RESUME
    assert world.train("weight", *WHOLE, "distillation.weight=0.5", resume=True) == 2
    assert "distillation.weight was 0.3 and is 0.5" in capsys.readouterr().err


def test_the_report_names_methods_and_compares_them_with_plain_prediction(world):
    runs = {
        "ntp": ["model.mixing=none"],
        "paused": ["model.mixing=pause"],
        "residual": ["model.concept_residual=true", labels(world)],
        "spaced": ["model.concept_every=4", labels(world)],
        "paused residual": ["model.mixing=pause", "model.concept_residual=true"],
        "predicted": ["model.mixing=predict", labels(world)],
        "distilled": [*DISTILLED, soft(world)],
    }
    for run, overrides in runs.items():
        assert world.train(run, *overrides) == 0
    table = comparison_table([load_run(world.folder / run) for run in runs])
    for title in (
        "NTP",
        "pause tokens",
        "CoCoMix with residual (cached labels)",
        "CoCoMix with a position every 4 tokens (cached labels)",
        "pause tokens with residual",
        "concept prediction (cached labels)",
        f"NTP with distillation (cached top-{TOP} soft targets)",
    ):
        assert f"\n{title} " in table
    flops = {run: load_run(world.folder / run).flops_per_token for run in runs}
    assert flops["ntp"] == flops["distilled"] < flops["predicted"] and flops["paused"] > 1.3 * flops["ntp"]
    assert load_run(world.folder / "distilled").info["soft_targets"] == "cached"


def test_the_work_of_a_teacher_beside_training_counts(world):
    for run, overrides in {"online": DISTILLED, "whole": WHOLE}.items():
        assert world.train(f"counted-{run}", *overrides, f"train.tokens={8 * SEQ_LEN}") == 0
    online, whole = (load_run(world.folder / f"counted-{run}") for run in ("online", "whole"))
    forward = 2 * (2 * (12 * 32 * 32 + SEQ_LEN * 32) + 300 * 32)
    config, vocabulary = online.info["config"]["model"], online.info["data"]["vocab_size"]
    student = 6 * (config["n_layer"] * (12 * 32 * 32 + SEQ_LEN * 32) + vocabulary * 32)
    assert online.flops_per_token == whole.flops_per_token == student + forward
    assert online.record.supervision_flops_per_token == forward


def test_what_a_cache_cost_is_told_by_the_runs_that_read_it(world):
    short = f"train.tokens={8 * SEQ_LEN}"
    assert world.train("of-cache", labels(world), short) == world.train("of-teacher", short) == 0
    cached, online = (load_run(world.folder / run).record for run in ("of-cache", "of-teacher"))
    teacher = online.flops_per_token - cached.flops_per_token
    assert cached.supervision_flops_per_token == online.supervision_flops_per_token == teacher > 0
    assert world.train("of-both", labels(world), short, *DISTILLED[1:], soft(world)) == 0
    both = load_run(world.folder / "of-both").record
    assert both.supervision_flops_per_token == teacher + 2 * (2 * (12 * 32 * 32 + SEQ_LEN * 32) + 300 * 32)
    assert world.train("of-nobody", "model.mixing=none", short) == 0
    assert load_run(world.folder / "of-nobody").record.supervision_flops_per_token == 0


def test_a_cache_that_does_not_tell_its_cost_leaves_it_open(world):
    meta = world.folder / "labels/meta.json"
    kept = meta.read_text()
    change_json(meta, {}, without=("flops_per_token",))
    try:
        assert world.train("early-cache", labels(world), f"train.tokens={8 * SEQ_LEN}") == 0
    finally:
        meta.write_text(kept)
    assert load_run(world.folder / "early-cache").record.supervision_flops_per_token is None


# ---- evaluation and use


@pytest.mark.parametrize("mixing", ["pause", "predict"])
def test_models_of_other_methods_are_evaluated_and_generate(world, mixing, capsys):
    run = f"used-{mixing}"
    assert world.train(run, f"model.mixing={mixing}", labels(world)) == 0
    assert main(["eval", str(world.folder / run)]) == 0
    assert main(["generate", str(world.folder / run), "--prompt", "the cat", "--max-new-tokens", "4"]) == 0
    assert "the cat" in capsys.readouterr().out
    assert main(["concepts", str(world.folder / run), "--text", "the cat"]) == 2
    assert f"mixes no concepts in (a cocomix model with mixing={mixing})" in capsys.readouterr().err


def test_labels_writes_what_the_config_learns_from(world, tmp_path, capsys):
    caches = [f"concept_labels.cache={tmp_path}/labels", f"distillation.cache={tmp_path}/soft"]
    assert main(["labels", str(world.config), *DISTILLED, *caches]) == 0
    assert (tmp_path / "soft").exists() and not (tmp_path / "labels").exists()
    assert (
        main(["labels", str(world.config), *caches, f"distillation.weight={WEIGHT}", f"distillation.top_k={TOP}"]) == 0
    )
    assert (tmp_path / "labels").exists() and "soft-targets: " in capsys.readouterr().out
    assert main(["labels", str(world.config), *DISTILLED]) == 2
    assert "distillation.cache is not set" in capsys.readouterr().err


# ---- what the names mean


def test_methods_differ_as_their_descriptions_say():
    assert [m for m in MIXING if doubles_sequence(m)] == ["interleave", "pause"]
    assert [m for m in MIXING if predicts_concepts(m)] == ["interleave", "add", "predict"]
    assert [m for m in MIXING if mixes_concepts(m)] == ["interleave", "add"]
    titles = [method_title(m, d, r) for m in MIXING for d in (False, True) for r in {False, doubles_sequence(m)}]
    assert len(set(titles)) == len(titles) == 14
    assert method_title("none", residual=True, every=4) == "NTP"
    assert method_title("pause", every=4) == "pause tokens with a position every 4 tokens"
    assert method_title("interleave", True, True) == "CoCoMix with residual and distillation"
