"""Soft targets: what a teacher of any family says, whole or its likeliest tokens, and the cache that keeps them."""

import os

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cocomix.core.config import load_config
from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json, write_json
from cocomix.teacher.distillation import DistillationTeacher
from cocomix.teacher.label_cache import LabelCache
from cocomix.teacher.soft_target_cache import SoftTargetCache

VOCABULARY, LENGTH, TOP = 50, 7, 4
SHAPE = {"n_windows": 5, "seq_len": LENGTH, "top_k": TOP, "shard_windows": 2}
FINGERPRINTS = {"data": "d", "teacher": "t", "top_k": "4", "dtype": "float32", "seq_len": "7"}


def gpt2(vocab_size=VOCABULARY, **more):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=24, n_layer=2, n_head=2, initializer_range=0.3, **more)
    ).eval()


def llama():
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            initializer_range=0.3,
        )
    ).eval()


def windows(n=3, length=LENGTH, seed=2):
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


# ---- the teacher


@pytest.mark.parametrize("make", [gpt2, llama])
def test_likeliest_tokens_are_those_of_the_models_own_logits(make):
    model, ids = make(), windows()
    found = DistillationTeacher(model, VOCABULARY, TOP).targets(ids)
    with torch.no_grad():
        log_probs, tokens = model(ids).logits.log_softmax(-1).topk(TOP)
    assert torch.equal(found["soft_target_ids"], tokens) and found["soft_target_ids"].dtype == torch.int64
    assert found["soft_target_log_probs"].dtype == torch.float16
    torch.testing.assert_close(found["soft_target_log_probs"].float(), log_probs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_hidden_states_times_the_head_are_the_models_own_logits(make):
    model, ids = make(), windows()
    found = DistillationTeacher(model, VOCABULARY, None).targets(ids)
    assert set(found) == {"teacher_hidden", "teacher_head"}
    with torch.no_grad():
        torch.testing.assert_close(found["teacher_hidden"] @ found["teacher_head"].T, model(ids).logits)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_ids_that_pad_the_teachers_vocabulary_get_no_probability():
    model, ids = gpt2(vocab_size=VOCABULARY + 14), windows()
    with torch.no_grad():
        model.transformer.wte.weight[VOCABULARY:] = 3 * model.transformer.wte.weight[:14]  # likely ones
        expected = model(ids).logits[..., :VOCABULARY].log_softmax(-1).topk(TOP)
    found = DistillationTeacher(model, VOCABULARY, TOP).targets(ids)
    assert torch.equal(found["soft_target_ids"], expected.indices)
    torch.testing.assert_close(found["soft_target_log_probs"].float(), expected.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("top_k", [TOP, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_targets_of_a_window_do_not_depend_on_the_batch_around_it(top_k, dtype):
    teacher, ids = DistillationTeacher(gpt2().to(dtype), VOCABULARY, top_k), windows(5)
    together = teacher.targets(ids)
    for row in range(5):
        for name, alone in teacher.targets(ids[row : row + 1]).items():
            assert torch.equal(alone[0], together[name][row]) or name == "teacher_head"


def test_large_logits_of_a_bfloat16_teacher_keep_their_differences():
    """GPT-2's lie around -100, where neighbours in bfloat16 are half a nat apart."""
    model, ids = gpt2().to(torch.bfloat16), windows()
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(1.0)
        model.transformer.wte.weight.sub_(4.0)
        hidden = model.transformer(ids).last_hidden_state.double()
        logits = hidden @ model.lm_head.weight.double().T
    assert logits.max() < -60
    found = DistillationTeacher(model, VOCABULARY, TOP).targets(ids)
    expected = logits.log_softmax(-1)
    log_probs = found["soft_target_log_probs"].double()
    torch.testing.assert_close(log_probs, expected.gather(-1, found["soft_target_ids"]), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(log_probs, expected.topk(TOP).values, rtol=2e-3, atol=2e-3)


def test_teachers_that_cannot_be_are_refused():
    with pytest.raises(CocomixError, match="distillation.top_k is 51 but the vocabulary has 50 tokens"):
        DistillationTeacher(gpt2(), VOCABULARY, VOCABULARY + 1)
    with pytest.raises(CocomixError, match="soft targets are wanted for windows of 17 tokens, but the teacher"):
        DistillationTeacher(gpt2(), VOCABULARY, TOP).targets(windows(length=17))
    model = gpt2()
    model.config.logit_scale = 2.0
    with pytest.raises(CocomixError, match="head is more than one matrix product"):
        DistillationTeacher(model, VOCABULARY, TOP)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distillation.weight=-1", "distillation.weight must not be negative"),
        ("distillation.weight=.nan", "distillation.weight must be a finite number"),
        ("distillation.top_k=0", "distillation.top_k must be positive, or null"),
        ("teacher.labels_by=size", "teacher.labels_by is 'size'; it must be attribution or activation"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, override, message):
    (tmp_path / "config.yaml").write_text("out: runs\n")
    with pytest.raises(CocomixError, match=message):
        load_config(tmp_path / "config.yaml", [override])
    with pytest.raises(CocomixError, match=r"are the same folder \(one\): name two"):
        load_config(
            tmp_path / "config.yaml", ["concept_labels.cache=one", "distillation.cache=one", "distillation.weight=1"]
        )
    with pytest.raises(CocomixError, match="distillation.cache is set but distillation.weight is 0: set the weight"):
        load_config(tmp_path / "config.yaml", ["distillation.cache=soft"])
    with pytest.raises(CocomixError, match="distillation.cache needs distillation.top_k"):
        load_config(
            tmp_path / "config.yaml", ["distillation.top_k=null", "distillation.cache=soft", "distillation.weight=1"]
        )


# ---- the cache


def new_cache(folder, **settings):
    return SoftTargetCache.create(folder, **{**SHAPE, "fingerprints": FINGERPRINTS, **settings})


def soft_targets(n_windows, seed=0):
    """Ids over the whole range of uint16 and log-probabilities from certain to impossible."""
    draw = np.random.default_rng(seed)
    ids = torch.from_numpy(
        draw.permuted(np.broadcast_to(np.arange(65535, 65525, -1), (n_windows, LENGTH, 10)), axis=-1)[..., :TOP].copy()
    )
    log_probs = torch.from_numpy(-draw.exponential(5, (n_windows, LENGTH, TOP)).astype(np.float16))
    log_probs[0, 0, 0], log_probs[0, 0, 1], ids[0, 0, 2] = 0, -torch.inf, 0
    return {"soft_target_ids": ids, "soft_target_log_probs": log_probs}


def test_soft_targets_come_back_bit_for_bit(tmp_path):
    cache, stored = new_cache(tmp_path), soft_targets(5)
    for shard in range(3):
        cache.append(shard, {name: part[list(cache.windows_of(shard))] for name, part in stored.items()})
    opened = SoftTargetCache.open(tmp_path)
    opened.require(FINGERPRINTS)
    opened.verify()
    for index in range(5):
        window = opened.window(index)
        assert window["soft_target_ids"].dtype == np.int64 and window["soft_target_log_probs"].dtype == np.float16
        assert all(np.array_equal(window[name], part[index].numpy()) for name, part in stored.items())


def test_a_soft_target_takes_four_bytes(tmp_path):
    cache = new_cache(tmp_path)
    cache.append(0, soft_targets(2))
    assert (
        os.path.getsize(tmp_path / "soft-targets-000000.bin") == 2 * LENGTH * TOP * 4 + 4 + 32 + 32
    )  # and what follows


def test_ids_beyond_two_bytes_and_other_shapes_are_refused(tmp_path):
    cache, wrong = new_cache(tmp_path), soft_targets(2)
    with pytest.raises(ValueError, match=r"soft-targets of shard 0 have shape \[2, 6, 8\], expected \[2, 7, 8\]"):
        cache.append(0, {name: part[:, 1:] for name, part in wrong.items()})
    wrong["soft_target_ids"][1, 2, 3] = 65536
    with pytest.raises(ValueError, match="token ids range from 0 to 65536, expected 0 to 65535"):
        cache.append(0, wrong)
    assert os.listdir(tmp_path) == ["meta.json"]


def test_a_cache_of_something_else_is_refused_by_name(tmp_path):
    new_cache(tmp_path)
    with pytest.raises(
        CocomixError,
        match="the soft-target cache .* was made from another number of soft targets a "
        "token.*another distillation.cache folder",
    ):
        new_cache(tmp_path, fingerprints={**FINGERPRINTS, "top_k": "9"})
    with pytest.raises(CocomixError, match=f"{tmp_path} holds soft targets, not labels: name another folder as conc"):
        LabelCache.open(tmp_path)
    meta = read_json(tmp_path / "meta.json", "it")
    write_json(tmp_path / "old" / "meta.json", {key: value for key, value in meta.items() if key != "holds"})
    with pytest.raises(CocomixError, match="old holds labels, not soft targets: name another folder as distillation.c"):
        SoftTargetCache.open(tmp_path / "old")  # of the time when there were labels alone
    del meta["top_k"]
    write_json(tmp_path / "meta.json", meta)
    with pytest.raises(CocomixError, match="missing required field `top_k`; the soft-target cache is damaged"):
        SoftTargetCache.open(tmp_path)


def test_soft_targets_of_a_large_vocabulary_take_six_bytes_and_come_back(tmp_path):
    cache, targets = new_cache(tmp_path, vocab_size=262_144), soft_targets(2)
    targets["soft_target_ids"] = targets["soft_target_ids"] * 4 + 3
    cache.append(0, targets)
    assert os.path.getsize(tmp_path / "soft-targets-000000.bin") == 2 * LENGTH * TOP * 6 + 4 + 32 + 32
    opened = SoftTargetCache.open(tmp_path)
    for index in range(2):
        window = opened.window(index)
        assert np.array_equal(window["soft_target_ids"], targets["soft_target_ids"][index].numpy())
        assert np.array_equal(window["soft_target_log_probs"], targets["soft_target_log_probs"][index].half().numpy())
