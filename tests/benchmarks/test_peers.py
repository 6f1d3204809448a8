"""The models that a training step is compared with: equal losses, gradients and labels, and their arithmetic."""

import sys
from pathlib import Path

import pytest
import torch
from flop_helpers import count_flops
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import CoCoMixConfig, CoCoMixForCausalLM, ConceptTeacher, SparseAutoencoder
from cocomix.core import machine
from cocomix.core.files import read_json
from cocomix.core.flops import forward_parts, ntp_forward
from cocomix.core.shapes import StudentShape, TeacherShape

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # programs, not part of the package
import peers
import profile_against

LENGTH, VOCABULARY, CONCEPTS, TOPK = 24, 128, 96, 6


def student(mixing="interleave", dtype=torch.float64, length=LENGTH, **more):
    torch.manual_seed(0)
    config = {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 2,
        "vocab_size": VOCABULARY,
        "n_positions": length,
        "concept_dim": CONCEPTS,
        "concept_topk": TOPK,
        "insert_layer": 1,
        "mixing": mixing,
        **more,
    }
    return CoCoMixForCausalLM(CoCoMixConfig(**config)).to(dtype).train()


def teacher(dtype=torch.float32, length=LENGTH, **more):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=length,
            n_embd=16,
            n_layer=4,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
            **more,
        )
    )
    weights = [torch.randn(CONCEPTS, 16) for _ in range(2)]
    sae = SparseAutoencoder(weights[0], 0.1 * torch.randn(CONCEPTS), torch.randn(16), weights[1], TOPK, normalize=True)
    return ConceptTeacher(model.to(dtype), sae.to(dtype), 1, 3)


def batch(length=LENGTH):
    """Tokens, and labels for all but the last position."""
    ids = torch.randint(VOCABULARY, (2, length))
    labels = torch.rand(2, length, CONCEPTS).topk(3).indices
    labels[:, -1] = -1
    return ids, labels


def losses_and_gradients(model, ids, labels):
    out = model(ids, labels=ids, concept_labels=labels, concept_token_count=torch.tensor(100))
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: getattr(out, name) for name in ("loss", "ntp_loss", "concept_loss")}, found


def assert_same(found, others, rtol=1e-9, atol=1e-12):
    assert found.keys() == others.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, others[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("mixing", "insert_layer"), [("interleave", 1), ("interleave", 0), ("interleave", 2), ("add", 1)]
)
def test_the_public_student_has_the_loss_and_the_gradients_of_ours(mixing, insert_layer):
    model, (ids, labels) = student(mixing, insert_layer=insert_layer), batch()
    ours = losses_and_gradients(model, ids, labels)
    way, seen = peers.public_student(model), []
    with way():
        hook = model.transformer.concept_predictor.register_forward_hook(
            lambda _module, _args, output: seen.append(output.values.shape)
        )
        theirs = losses_and_gradients(model, ids, labels)
        hook.remove()
    assert seen == [(2 * LENGTH, CONCEPTS)]  # it was dense indeed
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(mine, other)
    for mine, again in zip(ours, losses_and_gradients(model, ids, labels), strict=True):
        assert_same(mine, again, rtol=0)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_compiled_block_gets_its_forward_back():
    model = student()
    last = model.transformer.h[-1]
    last.forward = compiled = torch.compile(last.forward, backend="eager")
    with peers.public_student(model)():
        assert last.forward is not compiled
    assert last.forward is compiled


def test_the_public_teacher_gives_the_labels_of_ours_where_there_are_any():
    ours, ids = teacher(torch.float64), torch.randint(VOCABULARY, (3, LENGTH))
    expected, labels = ours.labels(ids), peers.PublicTeacher(ours).labels(ids)
    assert labels.shape == expected.shape and (expected[:, -1] == -1).all() and (expected >= 0).float().mean() > 0.5
    assert torch.equal(torch.where(expected >= 0, labels, -1), expected)
    assert not any(p.requires_grad or p.grad is not None for p in ours.model.parameters())
    assert torch.equal(ours.labels(ids), expected)


def public_flops(shape: StudentShape, of_labels: TeacherShape) -> float:
    """Operations per token: every query in every f block, a dense compress layer, and a teacher that is differentiated
    in full, with a dense product into the SAE and one for the attributions."""
    d, t = shape.n_embd, of_labels.n_embd
    parts = forward_parts(shape)
    parts["compress"] = shape.concept_dim * d
    parts["the last block's other queries"] = 10 * d * d + 2 * shape.seq_len * d
    gpt2 = of_labels.n_layer * (12 * t * t + shape.seq_len * t) + of_labels.vocab_size * t
    return 2 * (3 * sum(parts.values()) + 3 * gpt2 + 2 * of_labels.n_latents * t)


@pytest.mark.parametrize(
    ("n_embd", "n_layer", "insert_layer", "ratio"), [(512, 8, 3, 4.76), (1024, 24, 5, 2.36), (2048, 24, 5, 2.00)]
)
def test_the_public_ways_arithmetic_at_the_papers_sizes(n_embd, n_layer, insert_layer, ratio):
    shape = StudentShape(n_embd, n_layer, insert_layer, 50257, 1024, 32768, 32)
    assert public_flops(shape, TeacherShape(768, 12, 5, 50257, 32768)) / (6 * ntp_forward(shape)) == pytest.approx(
        ratio, abs=0.005
    )


def test_the_public_way_computes_what_its_formula_counts():
    """By PyTorch's counter, which sees every product of it."""
    length = 256
    model, labels_from = (
        student(dtype=torch.float32, length=length),
        teacher(length=length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    )
    ids, _ = batch(length)

    def step():
        with peers.public_student(model)():
            model(ids, labels=ids, concept_labels=peers.PublicTeacher(labels_from).labels(ids)).loss.backward()

    counted, seen = count_flops(step)
    shape = StudentShape(32, 3, 1, VOCABULARY, length, CONCEPTS, TOPK)
    expected = public_flops(shape, TeacherShape(16, 4, 1, VOCABULARY, CONCEPTS))
    assert ids.numel() * expected == pytest.approx(counted, rel=0.02)
    assert not any("cocomix" in name for name in seen)


def test_transformers_gpt2_has_the_loss_and_the_gradients_of_ours():
    model, (ids, _) = student("none"), batch()
    ours = losses_and_gradients(model, ids, None)
    parameters = dict(model.named_parameters())
    with peers.transformers_gpt2(model, compiled=False)():
        theirs = losses_and_gradients(model, ids, None)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(
            {name: value for name, value in mine.items() if value is not None},
            {name: value for name, value in other.items() if value is not None},
        )
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert "forward" not in vars(model)


@pytest.mark.slow
def test_transformers_gpt2_compiles():
    model, (ids, _) = student("none", dtype=torch.float32), batch()
    ours = losses_and_gradients(model, ids, None)
    with peers.transformers_gpt2(model, compiled=True)():
        theirs = losses_and_gradients(model, ids, None)
    assert_same(ours[1], theirs[1], rtol=1e-3, atol=1e-6)


def test_a_profile_measures_them_beside_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(machine._PRODUCT_SIDE, "cpu", 128)
    (tmp_path / "config.yaml").write_text(f"""
        data: {{seq_len: {LENGTH}}}
        model: {{n_embd: 32, n_layer: 3, n_head: 2, concept_dim: {CONCEPTS}, concept_topk: {TOPK}, insert_layer: 1}}
        teacher: {{label_topk: 3}}
        train: {{global_batch: 4, micro_batch: 4, tensorboard: false}}
    """)
    assert (
        profile_against.main(
            [
                str(tmp_path / "config.yaml"),
                "--vocab-size",
                str(VOCABULARY),
                "--labels",
                "cached",
                "--against",
                "public",
                "--against",
                "transformers",
                "--rounds",
                "1",
                "--json",
                str(tmp_path / "out.json"),
            ]
        )
        == 0
    )
    methods = read_json(tmp_path / "out.json", "figures")["methods"]
    assert {name: method["of"] for name, method in methods.items()} == {
        "ntp": None,
        "cached": None,
        "transformers": "ntp",
        "public cached": "cached",
    }
    public = methods["public cached"]
    assert public["flops_per_token"] == methods["cached"]["flops_per_token"]  # what is needed, not what is done
    assert public["parts"]["concept head, backward"] > 0 and methods["transformers"]["parts"] is None
    assert methods["transformers"]["efficiency"] is None and methods["transformers"]["ratio"]["median"] > 0
    text = capsys.readouterr().out
    assert f"CoCoMix, cached labels: {public['slower']['median']:.2f} (" in text and "NTP: " in text
