import json
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_helpers import set_chunk_bytes
from torch.nn import functional as F

from cocomix.core.config import Config, DataConfig, SaeConfig, TeacherConfig
from cocomix.core.errors import CocomixError
from cocomix.data.preparation import prepare
from cocomix.teacher import sae_training
from cocomix.teacher.sae import SparseAutoencoder
from cocomix.teacher.sae_metrics import evaluate, losses_under_reconstruction
from cocomix.teacher.sae_training import new_state, run, sae_loss, shuffled_batches, train_sae

D, N_FEATURES, ACTIVE = 32, 64, 3
VOCAB, SEQ_LEN, WIDTH = 270, 16, 24


def sparse_data(seed, n=512):
    """Activations [n, D] that are sums of ACTIVE of N_FEATURES fixed directions, with a little noise and an offset."""
    directions = F.normalize(torch.randn(N_FEATURES, D, generator=torch.Generator().manual_seed(987)), dim=1)
    generator = torch.Generator().manual_seed(1000 + seed)
    chosen = torch.rand(n, N_FEATURES, generator=generator).topk(ACTIVE, dim=1).indices
    strength = 0.5 + torch.rand(n, ACTIVE, generator=generator)
    clean = F.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
    return clean + 0.01 * torch.randn(n, D, generator=generator) + 0.3


def batches(start=0):
    return (sparse_data(i) for i in range(start, 10_000))


def small_config(**changes):
    defaults = SaeConfig(
        n_latents=96,
        k=5,
        tokens=512 * 40,
        batch_tokens=512,
        lr=3e-3,
        warmup_steps=5,
        aux_k=16,
        dead_after_tokens=512 * 8,
    )
    return replace(defaults, **changes)


def test_a_known_sparse_dictionary_is_recovered():
    config = small_config(tokens=200_000, lr=1e-2, dead_after_tokens=20_000, aux_k=32)
    sae, metrics = train_sae(batches(), D, config)
    found = evaluate(sae, [sparse_data(-1, n=4096)])
    assert found["explained_variance"] > 0.93 and metrics["explained_variance"] > 0.9
    assert found["dead_share"] < 0.25 and found["l0"] <= config.k
    directions = F.normalize(torch.randn(N_FEATURES, D, generator=torch.Generator().manual_seed(987)), dim=1)
    centred = F.normalize(directions - directions.mean(1, keepdim=True), dim=1)  # normalisation takes the mean out
    best = (centred @ sae.decoder.detach().T).max(1).values
    assert best.mean() > 0.95


def half_dead_state(config):
    state = new_state(D, config)
    with torch.no_grad():
        state.sae.latent_bias[:48] = -2.5  # half of the latents are too weak to be among the k largest
    return state


def test_auxk_brings_dead_latents_back():
    def dead_share(aux_k):
        config = small_config(tokens=512 * 150, aux_k=aux_k, lr=1e-2)
        return train_sae(batches(), D, config, state=half_dead_state(config))[1]["dead_share"]

    assert dead_share(0) > 0.3
    assert dead_share(32) < 0.15


def dense_loss(x_hat, W_enc, latent_bias, pre_bias, decoder, dead, config):
    """The loss with [n, C] latents, as the paper writes it."""

    def keep_largest(pre, k):
        threshold = pre.sort(1, descending=True).values[:, k - 1 : k]
        return torch.where(pre >= threshold, pre, 0).relu()

    def normalized(prediction, target):
        return (prediction - target).square().mean() / (target - target.mean(0)).square().mean()

    pre = (x_hat - pre_bias) @ W_enc.T + latent_bias
    reconstruction = keep_largest(pre, config.k) @ decoder + pre_bias
    is_dead = torch.zeros(len(W_enc), dtype=torch.bool).index_fill(0, dead, True)
    aux_latents = keep_largest(pre.masked_fill(~is_dead, -torch.inf), min(config.aux_k, len(dead)))
    aux = normalized(aux_latents @ decoder, (x_hat - reconstruction).detach())
    return normalized(reconstruction, x_hat) + config.aux_weight * aux


@pytest.mark.parametrize("way", ["products", "products in chunks", "rows"])
@pytest.mark.parametrize("n_dead", [40, 7], ids=["more dead than aux_k", "fewer"])
def test_loss_and_all_gradients_equal_a_dense_version(n_dead, way, monkeypatch):
    if way == "rows":
        monkeypatch.setattr(sae_training, "_DENSE_LATENTS", 0)
    elif way == "products in chunks":
        set_chunk_bytes(monkeypatch, 2**13)
    config = small_config(aux_weight=0.5)
    sae = new_state(D, config).sae.double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    dead = torch.randperm(config.n_latents)[:n_dead].sort().values
    x_hat = sae.normalize(sparse_data(0, n=50).double())[0]
    loss, unexplained, fired = sae_loss(sae, x_hat, dead, config)
    loss.backward()
    copies = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    expected = dense_loss(x_hat, **copies, dead=dead, config=config)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert unexplained < loss and fired.sum() <= 50 * config.k
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, copies[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_decoder_rows_keep_unit_norm_and_the_first_batch_sets_pre_bias():
    config = small_config(tokens=512, lr=1e-9)
    sae, _ = train_sae(batches(), D, config)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(96))
    torch.testing.assert_close(sae.pre_bias, sae.normalize(sparse_data(0))[0].mean(0), rtol=1e-4, atol=1e-6)
    sae, _ = train_sae(batches(), D, small_config())
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(96))


def test_the_gradient_is_clipped_and_has_no_part_along_the_decoder_rows():
    config = small_config()
    state = new_state(D, config)
    with torch.no_grad():
        state.sae.W_enc *= 100  # reconstructions and so gradients far too large
    rows = state.sae.decoder.detach().clone()
    sae_training.train_step(state, sparse_data(0), config)
    gradients = [parameter.grad for parameter in state.sae.parameters()]
    torch.testing.assert_close(torch.stack([g.norm() for g in gradients]).norm(), torch.tensor(1.0))
    gradient = state.sae.decoder.grad
    assert gradient.norm() > 1e-3
    assert (gradient * rows).sum(1).abs().max() < 1e-5 * gradient.norm()


def test_learning_rate_warms_up_and_decays_over_the_last_fifth():
    config = small_config(tokens=512 * 100, warmup_steps=10)
    factors = [sae_training._lr_factor(step, config) for step in range(100)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(factors[10:81], 1)
    np.testing.assert_allclose(factors[80:], np.arange(20, 0, -1) / 20)


def test_a_saved_and_loaded_state_goes_on_bit_for_bit(tmp_path):
    config, path = small_config(), tmp_path / "sae.partial.pt"

    def stop(state):
        if state.step == 17:
            sae_training.save_state(path, state, {"of": "this"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(batches(), D, config, state=half_dead_state(config), after_step=stop)
    state = sae_training.load_state(path, D, config, "cpu", {"of": "this"})
    assert state.step == 17 and len(state.dead(config)) > 0
    resumed, resumed_metrics = train_sae(batches(17), D, config, state=state)
    whole, metrics = train_sae(batches(), D, config, state=half_dead_state(config))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert resumed_metrics == metrics
    assert sae_training.load_state(path, D, config, "cpu", {"of": "another"}) is None


def test_a_loss_that_is_not_finite_is_reported():
    data = (sparse_data(0) * torch.inf for _ in range(100))
    with pytest.raises(CocomixError, match="not finite.*sae.lr"):
        train_sae(data, D, small_config())


def test_too_few_activations_are_an_error():
    with pytest.raises(ValueError, match="after step 3 of 40"):
        train_sae(islice(batches(), 3), D, small_config())


@pytest.mark.parametrize("batch_tokens", [5, 12, 30])
def test_shuffled_batches_read_every_row_once_and_start_anywhere(batch_tokens):
    def read_block(index):
        return torch.arange(12 * index, 12 * index + 12)[:, None]

    def stream(start=0):
        return shuffled_batches(read_block, 12, batch_tokens, seed=3, start_step=start)

    n = 60 // batch_tokens
    rows = torch.cat(list(islice(stream(), n)))
    assert sorted(rows[:, 0].tolist()) == list(range(60))
    assert rows[:12, 0].tolist() != list(range(12))
    for start in range(n):
        assert torch.equal(torch.cat(list(islice(stream(start), n - start))), rows[start * batch_tokens :])


def test_evaluate_counts_variance_activity_and_deadness_over_all_batches():
    config = small_config()
    sae = new_state(D, config).sae
    data = [sparse_data(i, n=n) for i, n in enumerate((100, 57))]
    with torch.no_grad():
        sae.latent_bias[:10] = -100
        x_hat = sae.normalize(torch.cat(data))[0].double()
        values, indices = sae.encode(torch.cat(data))
        error = (sae.decode(values, indices) - x_hat).square().sum()
    variance = (x_hat - x_hat.mean(0)).square().sum()
    silent = torch.ones(96, dtype=torch.bool)
    silent[:4] = False
    found = evaluate(sae, data, silent)
    assert found["tokens"] == 157
    assert found["explained_variance"] == pytest.approx((1 - error / variance).item(), abs=1e-5)
    assert found["l0"] == pytest.approx((values > 0).sum().item() / 157)
    unfired = 96 - len(indices[values > 0].unique())
    assert evaluate(sae, data)["dead_share"] == pytest.approx(unfired / 96)
    assert found["dead_share"] == pytest.approx((unfired - 4) / 96)


def teacher_and_windows():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=D, n_layer=3, n_head=2, initializer_range=0.2)
    ).eval()
    return model, [torch.randint(50, (n, length)) for n, length in ((2, 16), (1, 9))]


@torch.no_grad()
def naive_losses(model, layer, sae, windows):
    """The blocks one by one, and logits, as a check of the hooks."""

    def loss(ids, change):
        x = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
        for number, block in enumerate(model.transformer.h):
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
            x = change(x) if number == layer else x
        logits = model.lm_head(model.transformer.ln_f(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    count = sum(ids[:, 1:].numel() for ids in windows)
    return [float(sum(loss(ids, change) for ids in windows)) / count for change in (lambda x: x, sae, torch.zeros_like)]


@pytest.mark.parametrize("layer", [0, 2])
def test_losses_with_the_reconstruction_in_place_of_the_activation(layer):
    model, windows = teacher_and_windows()
    sae = new_state(D, small_config()).sae
    found = losses_under_reconstruction(model, layer, sae, windows)
    clean, reconstructed, zeroed = naive_losses(model, layer, sae, windows)
    assert len({clean, reconstructed, zeroed}) == 3
    assert found["loss_clean"] == pytest.approx(clean, rel=1e-5)
    assert found["loss_reconstructed"] == pytest.approx(reconstructed, rel=1e-5)
    assert found["loss_zeroed"] == pytest.approx(zeroed, rel=1e-5)
    assert found["loss_recovered"] == pytest.approx((zeroed - reconstructed) / (zeroed - clean), abs=1e-3)
    assert not model.transformer.h[layer]._forward_hooks


def test_a_perfect_reconstruction_recovers_the_whole_loss_and_a_useless_one_none():
    model, windows = teacher_and_windows()
    eye = torch.eye(D)
    perfect = SparseAutoencoder(
        torch.cat([eye, -eye]), torch.zeros(2 * D), torch.zeros(D), torch.cat([eye, -eye]), 2 * D, normalize=False
    )
    useless = SparseAutoencoder(eye, torch.full((D,), -1e6), torch.zeros(D), eye, D, normalize=False)
    assert losses_under_reconstruction(model, 1, perfect, windows)["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert losses_under_reconstruction(model, 1, useless, windows)["loss_recovered"] == 0


def write_teacher(folder, vocab_size=VOCAB):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    shape = GPT2Config(
        vocab_size=vocab_size,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=3,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def token_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    letters = np.random.default_rng(0).choice(list("abcdefgh "), 2000)
    (folder / "a.txt").write_text("".join(letters[:1500]))  # the first document trains, the second validates
    (folder / "b.txt").write_text("".join(letters[1500:]))
    texts = [str(folder / name) for name in ("a.txt", "b.txt")]
    return prepare(DataConfig(folder=str(folder / "data"), text=texts, vocab_size=VOCAB, seq_len=SEQ_LEN))


@pytest.fixture
def config(tmp_path, teacher, token_files, monkeypatch):
    monkeypatch.setattr(sae_training, "BUFFER_BATCHES", 3)
    return Config(
        data=DataConfig(folder=str(token_files.folder), seq_len=SEQ_LEN),
        teacher=TeacherConfig(model=str(teacher), sae=str(tmp_path / "sae"), layer=1),
        sae=SaeConfig(
            n_latents=64, k=4, tokens=3000, batch_tokens=100, lr=3e-3, warmup_steps=2, aux_k=8, dead_after_tokens=500
        ),
    )


def interrupt_at(monkeypatch, step):
    """Make the training step number `step` fail as Ctrl-C does, with a state saved after every step before it."""
    original = sae_training.train_step

    def train_step(state, x, config):
        if state.step == step:
            raise KeyboardInterrupt
        original(state, x, config)

    monkeypatch.setattr(sae_training, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(sae_training, "train_step", train_step)


def test_run_trains_on_the_teacher_and_saves_metrics_and_settings(config, token_files, tmp_path, capsys):
    metrics = run(config)
    sae = SparseAutoencoder.load(tmp_path / "sae")
    saved = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert (sae.d_model, sae.n_latents, sae.k, sae.normalization) == (WIDTH, 64, 4, "layer_norm")
    assert saved["metrics"] == metrics and saved["training"]["teacher.layer"] == 1
    assert metrics["tokens"] == token_files.split("val").n_windows(SEQ_LEN) * SEQ_LEN
    assert metrics["explained_variance"] > 0.2
    recovered = metrics["loss_zeroed"] - metrics["loss_reconstructed"]
    assert metrics["loss_recovered"] == recovered / (metrics["loss_zeroed"] - metrics["loss_clean"])
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in ("explained variance", "l0", "dead share", "loss recovered"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["sae"]


def test_run_reads_the_residual_stream_after_the_block(config, teacher, token_files, tmp_path):
    from transformers import AutoModelForCausalLM

    metrics = run(config)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    split = token_files.split("val")
    ids = torch.from_numpy(np.stack([split.window(i, SEQ_LEN) for i in range(split.n_windows(SEQ_LEN))]))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2].flatten(0, 1)  # 0 is the embedding
    found = evaluate(SparseAutoencoder.load(tmp_path / "sae"), [hidden])
    assert found["explained_variance"] == pytest.approx(metrics["explained_variance"], abs=1e-4)


def test_an_interrupted_run_leaves_no_sae_and_goes_on_bit_for_bit(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 13)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["sae.partial.pt"]
    metrics = run(config)
    assert "going on from" in capsys.readouterr().out
    assert not (tmp_path / "sae.partial.pt").exists()
    other = replace(config, teacher=replace(config.teacher, sae=str(tmp_path / "whole")))
    assert run(other) == metrics
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "sae" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_precision_of_the_machines_choice_stays_with_the_sae(config, tmp_path, monkeypatch, capsys):
    auto = replace(config, teacher=replace(config.teacher, dtype="auto"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    with monkeypatch.context() as patched:
        interrupt_at(patched, 13)
        with pytest.raises(KeyboardInterrupt):
            run(auto)
    assert "teacher.dtype=auto: fp32, since this processor does not" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    metrics = run(auto)
    out = capsys.readouterr().out
    assert "teacher.dtype=auto: fp32, since what is continued began with it" in out and "going on from" in out
    assert run(auto) == metrics  # the finished one is recognised


def test_a_partial_state_of_other_settings_is_not_used(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(replace(config, sae=replace(config.sae, n_latents=48)))
    assert "starting afresh" in capsys.readouterr().out
    assert SparseAutoencoder.load(tmp_path / "sae").n_latents == 48


def test_a_damaged_partial_state_is_reported(config, tmp_path):
    (tmp_path / "sae.partial.pt").write_bytes(b"PK damaged")
    with pytest.raises(CocomixError, match="sae.partial.pt cannot be read.*delete it"):
        run(config)


def test_activations_stream_through_a_bounded_buffer(config, monkeypatch):
    """However long the training, no more than two blocks of activations live at a time."""
    living, most = set(), []
    original = sae_training.shuffled_batches

    def watched(read_block, *arguments):
        def read(index):
            block = read_block(index)
            assert len(block) == sae_training.math.ceil(3 * 100 / SEQ_LEN) * SEQ_LEN
            living.add(index)
            weakref.finalize(block, living.discard, index)
            most.append(len(living))
            return block

        return original(read, *arguments)

    monkeypatch.setattr(sae_training, "shuffled_batches", watched)
    run(config)
    assert len(most) >= 10 and max(most) <= 2


KILLED = """
import os, signal, sys
from cocomix.teacher import sae_training
from cocomix.core.config import load_config
sae_training.STATE_SECONDS, sae_training.BUFFER_BATCHES, kill_at = 0.0, 3, int(sys.argv[2])
count = 0

def counted(function):
    def call(*arguments, **settings):
        global count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)
    return call

# what comes between two changes of the disk
for module, name in ((os, "replace"), (os, "fsync"), (sae_training, "train_step"), (sae_training.Path, "unlink")):
    setattr(module, name, counted(getattr(module, name)))
sae_training.run(load_config(sys.argv[1], sys.argv[3:]))
"""


@pytest.mark.slow
def test_a_training_that_is_killed_anywhere_goes_on_to_the_same_bytes(config, tmp_path):
    names = {
        "data.folder": config.data.folder,
        "data.seq_len": SEQ_LEN,
        "teacher.model": config.teacher.model,
        "teacher.layer": 1,
        **{f"sae.{name}": value for name, value in vars(config.sae).items()},
    }
    (tmp_path / "empty.yaml").write_text("{}")

    def start(folder, kill_at):
        command = [
            sys.executable,
            "-c",
            KILLED,
            str(tmp_path / "empty.yaml"),
            str(kill_at),
            f"teacher.sae={tmp_path / folder}",
            *(f"{name}={value}" for name, value in names.items()),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    names["sae.tokens"] = 400
    done = start("whole", 0)
    assert done.returncode == 0, done.stderr
    kills = 0
    while start("killed", 3 + 2 * kills).returncode == -signal.SIGKILL:
        kills += 1
    assert kills >= 3
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed.partial.pt").exists()


def test_what_is_left_of_a_finished_training_is_cleared_away(config, tmp_path):
    run(config)
    (tmp_path / "sae.partial.pt").write_bytes(b"left over by a kill")
    run(config)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["sae"]


def test_a_finished_sae_is_not_trained_again(config, tmp_path, monkeypatch, capsys):
    metrics = run(config)
    interrupt_at(monkeypatch, 0)
    assert run(config) == metrics
    assert "already holds this SAE" in capsys.readouterr().out


def test_a_finished_sae_of_other_settings_is_kept_and_the_difference_named(config, tmp_path):
    run(config)
    before = SparseAutoencoder.load(tmp_path / "sae").fingerprint()
    with pytest.raises(CocomixError, match="differs in sae.lr, teacher.layer"):
        run(replace(config, sae=replace(config.sae, lr=1e-4), teacher=replace(config.teacher, layer=0)))
    assert SparseAutoencoder.load(tmp_path / "sae").fingerprint() == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_cocomix_sae_did_not_write_is_never_overwritten(config, tmp_path, kind):
    path = tmp_path / "sae"
    if kind == "folder":
        path.mkdir()
        path = path / "thesis.txt"
    path.write_text("precious")
    with pytest.raises(CocomixError, match="was not written by `cocomix sae`"):
        run(config)
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": None}, "teacher.model is not set"),
        ({"sae": None}, "teacher.sae is not set"),
        ({"layer": 3}, "teacher.layer is 3.*blocks 0 to 2"),
    ],
)
def test_teacher_settings_that_do_not_fit_are_errors(config, change, words):
    with pytest.raises(CocomixError, match=words):
        run(replace(config, teacher=replace(config.teacher, **change)))


def test_a_teacher_whose_loss_could_not_be_told_is_refused_before_any_training(config, tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    GraniteForCausalLM(
        GraniteConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=32,
            logits_scaling=4.0,
        )
    ).save_pretrained(tmp_path / "granite")
    with pytest.raises(CocomixError, match="a granite teacher is not supported"):
        run(replace(config, teacher=replace(config.teacher, model=str(tmp_path / "granite"))))


def test_a_vocabulary_beyond_the_teachers_is_an_error(config, token_files, tmp_path):
    write_teacher(tmp_path / "small", vocab_size=100)
    with pytest.raises(CocomixError, match=f"knows 100 tokens.*use {token_files.vocab_size}"):
        run(replace(config, teacher=replace(config.teacher, model=str(tmp_path / "small"))))


def test_windows_beyond_the_teachers_context_are_an_error(config):
    with pytest.raises(CocomixError, match="data.seq_len is 64.*at most 32"):
        run(replace(config, data=replace(config.data, seq_len=64)))


@pytest.mark.slow
def test_the_benchmark_of_a_training_step_runs(tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "bench_sae.py"
    done = subprocess.run(
        [
            sys.executable,
            script,
            "--tokens",
            "64",
            "--width",
            "16",
            "--latents",
            "320",
            "--rounds",
            "2",
            "--threads",
            "1",
            "--json",
            tmp_path / "figures.json",
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(len(times) == 2 and min(times) > 0 for times in figures["seconds"].values())
    for name, ratio in figures["ratios"].items():
        assert f"{name} " in done.stdout and f" {ratio:.2f}" in done.stdout
