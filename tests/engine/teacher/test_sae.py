import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_helpers import set_chunk_bytes, trace
from safetensors.torch import save_file
from stored_json import change_json

from cocomix.core.errors import CocomixError
from cocomix.teacher.sae import SparseAutoencoder

DATA = Path(__file__).parents[2] / "fixtures"
GOLDEN = DATA / "sae_golden.pt"
C, D, K = 40, 12, 5
SAELENS = (
    "topk",
    "topk_5",
    "topk_layer_norm",
    "topk_rescaled",
    "standard",
    "standard_constant_norm",
    "jumprelu",
    "jumprelu_layer_norm",
)
TOPK_FILES = ("openai_topk.pt", "sparsify", *(f"saelens_{name}" for name in SAELENS[:4]))
THRESHOLD_FILES = ("openai_relu.pt", *(f"saelens_{name}" for name in SAELENS[4:]))


def random_sae(normalize=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((C, D), (C,), (D,), (C, D))
    return SparseAutoencoder(*(torch.randn(s, generator=generator) for s in shapes), K, normalize=normalize)


def activations(*shape):
    return 3 + 2 * torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def dense_latents(x, sae):
    """As the method writes it, in float64: [..., C] with zeros."""
    x = x.double()
    if sae.normalization == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        x = centred / ((centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt() + 1e-5)
    pre = (x - sae.pre_bias.double()) @ sae.W_enc.double().T + sae.latent_bias.double()
    threshold = pre.sort(-1, descending=True).values[..., sae.k - 1 : sae.k]
    return torch.where(pre >= threshold, pre, 0).relu()


def scattered(values, indices, width=C):
    return torch.zeros(*values.shape[:-1], width, dtype=torch.float64).scatter(-1, indices, values.double())


def saelens_folder(folder, sae, **config):
    folder.mkdir(exist_ok=True)
    save_file(
        {
            "W_enc": sae.W_enc.detach().T.contiguous(),
            "b_enc": sae.latent_bias.detach(),
            "W_dec": sae.decoder.detach(),
            "b_dec": sae.pre_bias.detach(),
        },
        folder / "sae_weights.safetensors",
    )
    defaults = {
        "architecture": "topk",
        "d_in": D,
        "d_sae": C,
        "k": K,
        "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": True,
    }
    (folder / "cfg.json").write_text(json.dumps(defaults | config))
    return folder


def sparsify_folder(folder, sae, **config):
    folder.mkdir(exist_ok=True)
    save_file(
        {
            "encoder.weight": sae.W_enc.detach(),
            "encoder.bias": sae.latent_bias.detach(),
            "W_dec": sae.decoder.detach(),
            "b_dec": sae.pre_bias.detach(),
        },
        folder / "sae.safetensors",
    )
    defaults = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": C,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "activation": "topk",
        "d_in": D,
    }
    (folder / "cfg.json").write_text(json.dumps(defaults | config))
    return folder


def openai_content(sae):
    return {
        "encoder.weight": sae.W_enc.detach(),
        "latent_bias": sae.latent_bias.detach(),
        "pre_bias": sae.pre_bias.detach(),
        "decoder.weight": sae.decoder.detach().T.contiguous(),
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }


# --- other programs' files: `tests/fixtures/make_sae_files.py` wrote down what those programs make of them


def expected_of(name):
    """Activations, and the other program's dense latents and reconstruction."""
    with np.load(DATA / "saes" / "expected.npz") as arrays:
        return [torch.from_numpy(arrays[key]) for key in ("x", f"{name}.latents", f"{name}.reconstruction")]


def largest(latents, k):
    kept = latents.topk(k, -1)
    return torch.zeros_like(latents).scatter(-1, kept.indices, kept.values)


@pytest.mark.parametrize("name", TOPK_FILES)
def test_a_topk_file_encodes_and_reconstructs_as_its_own_program_does(name):
    sae, (x, latents, reconstruction) = SparseAutoencoder.load(DATA / "saes" / name), expected_of(name)
    assert sae.k == K and (latents > 0).sum(-1).max() == K
    torch.testing.assert_close(scattered(*sae.encode(x)).float(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), reconstruction, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", THRESHOLD_FILES)
def test_a_relu_or_jumprelu_file_keeps_its_own_threshold_and_at_most_k_latents(name):
    x, latents, reconstruction = expected_of(name)
    active = int((latents > 0).sum(-1).max())
    assert K < active < C
    whole = SparseAutoencoder.load(DATA / "saes" / name)
    assert whole.k == 32 >= active  # as many as the paper keeps, where the file does not say
    torch.testing.assert_close(scattered(*whole.encode(x)).float(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole(x), reconstruction, rtol=1e-4, atol=1e-3)
    few = SparseAutoencoder.load(DATA / "saes" / name, k=K)
    values, indices = few.encode(x)
    assert values.shape[-1] == K and (values[:, :-1] >= values[:, 1:]).all()
    torch.testing.assert_close(scattered(values, indices).float(), largest(latents, K), rtol=1e-4, atol=1e-4)


def test_a_jumprelu_latent_below_its_high_threshold_takes_no_place():
    """The k largest of the active ones, not the active ones of the k largest."""
    sae = SparseAutoencoder(
        torch.tensor([[5.0], [4.0], [1.0]]),
        torch.zeros(3),
        torch.zeros(1),
        torch.ones(3, 1),
        1,
        normalize=False,
        threshold=torch.tensor([6.0, 4.0, 0.5]),
    )
    values, indices = sae.encode(torch.tensor([[1.0], [0.1], [-1.0]]))
    assert values.tolist() == [[1.0], [0.0], [0.0]]  # a latent that equals its threshold is not active
    assert indices[0].tolist() == [2]


def test_jumprelu_latents_are_held_for_a_chunk_of_tokens_only(monkeypatch):
    set_chunk_bytes(monkeypatch, 2**16)
    sae = SparseAutoencoder(
        torch.randn(1024, D),
        torch.zeros(1024),
        torch.zeros(D),
        torch.randn(1024, D),
        K,
        normalize=True,
        threshold=torch.ones(1024),
    )
    with torch.no_grad():
        x, found = activations(512), []
        _, _, largest_bytes = trace(lambda: found.extend(sae.encode(x)))
        assert largest_bytes < 512 * 1024 * 4 / 4
        pre = (sae.normalize(x)[0] - sae.pre_bias) @ sae.W_enc.T
    torch.testing.assert_close(scattered(*found, width=1024).float(), largest(pre * (pre > 1), K))


@pytest.mark.parametrize(("own", "asked", "kept"), [("sparsify", 3, 3), ("sparsify", 30, K), ("openai_relu.pt", 7, 7)])
def test_at_most_k_latents_are_kept_and_never_more_than_a_topk_file_has(own, asked, kept):
    assert SparseAutoencoder.load(DATA / "saes" / own, k=asked).k == kept


@pytest.mark.parametrize("k", [0, C + 1])
def test_a_k_that_does_not_fit_is_refused(k):
    with pytest.raises(CocomixError, match=f"openai_relu.pt: the SAE's k is {k}; .* from 1 to its {C} latents"):
        SparseAutoencoder.load(DATA / "saes" / "openai_relu.pt", k=k)


@pytest.mark.parametrize("name", ["saelens_jumprelu_layer_norm", "saelens_standard_constant_norm"])
def test_thresholds_and_normalisation_survive_saving(tmp_path, name):
    sae = SparseAutoencoder.load(DATA / "saes" / name)
    sae.save(tmp_path / "own")
    again, x = SparseAutoencoder.load(tmp_path / "own"), expected_of(name)[0]
    assert again.fingerprint() == sae.fingerprint() and again.normalization == sae.normalization
    assert all(torch.equal(a, b) for a, b in zip(again.encode(x), sae.encode(x), strict=True))
    if sae.threshold is not None:
        again.threshold += 1e-3
        assert again.fingerprint() != sae.fingerprint()


def test_constant_norm_of_a_zero_vector_is_zero():
    x_hat, _, scale = SparseAutoencoder.load(DATA / "saes" / "saelens_standard_constant_norm").normalize(
        torch.stack([torch.zeros(D), torch.full((D,), -3.0)])
    )
    assert x_hat.tolist() == [[0.0] * D, [-1.0] * D]
    assert scale.tolist() == [[0.0], [3.0]]


# --- the formula


@pytest.mark.parametrize("normalize", [True, False])
def test_encode_gives_the_k_largest_latents_after_relu(normalize):
    sae, x = random_sae(normalize), activations(3, 7)
    values, indices = sae.encode(x)
    assert values.shape == indices.shape == (3, 7, K) and indices.dtype == torch.int64
    assert (values[..., :-1] >= values[..., 1:]).all()
    torch.testing.assert_close(scattered(values, indices), dense_latents(x, sae), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_forward_is_the_dense_reconstruction_in_the_space_of_the_input(normalize):
    sae, x = random_sae(normalize), activations(4, 6)
    expected = dense_latents(x, sae) @ sae.decoder.double() + sae.pre_bias.double()
    if normalize:
        expected = expected * x.double().std(-1, keepdim=True) + x.double().mean(-1, keepdim=True)
    torch.testing.assert_close(sae(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_kept_latents_below_zero_come_out_as_zero():
    sae, x = random_sae(), activations(20)
    with torch.no_grad():
        sae.latent_bias -= 6
    values, indices = sae.encode(x)
    assert 0 < (values == 0).sum() < values.numel() and (values >= 0).all()
    torch.testing.assert_close(scattered(values, indices), dense_latents(x, sae), rtol=1e-5, atol=1e-5)


def test_normalization_uses_the_unbiased_deviation_and_adds_epsilon_after_the_root():
    x = torch.tensor([[0.0, 2e-5] + [1e-5] * (D - 2)])
    x_hat, mean, std = random_sae().normalize(x)
    expected = np.std(x.numpy().astype(np.float64), ddof=1)
    np.testing.assert_allclose(std.item(), expected, rtol=1e-5)
    np.testing.assert_allclose(x_hat[0, 1].item(), 1e-5 / (expected + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(mean.item(), 1e-5, rtol=1e-5)


def test_constant_inputs_do_not_divide_by_zero():
    assert torch.isfinite(random_sae()(torch.full((2, D), 7.0))).all()


def test_half_precision_activations_are_normalised_in_fp32():
    sae, x = random_sae(), activations(5).bfloat16()
    for half, full in zip(sae.normalize(x), sae.normalize(x.float()), strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_a_half_precision_sae_encodes_and_decodes():
    sae, x = random_sae().bfloat16(), activations(5)
    assert (sae(x).float() - random_sae()(x)).abs().max() < 0.2 * x.std() * sae.decoder.float().norm(dim=1).max()


def test_gradients_reach_every_parameter_through_decode():
    sae = random_sae()
    sae(activations(6)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in sae.parameters())


def test_openai_file_loads_with_its_k_and_normalisation():
    sae = SparseAutoencoder.load(GOLDEN)
    content = torch.load(GOLDEN, weights_only=True)
    assert (sae.d_model, sae.n_latents, sae.k, sae.normalization) == (32, 128, 8, "layer_norm")
    assert torch.equal(sae.W_enc, content["encoder.weight"]) and torch.equal(sae.decoder, content["decoder.weight"].T)
    assert torch.equal(sae.pre_bias, content["pre_bias"]) and torch.equal(sae.latent_bias, content["latent_bias"])


def test_openai_k_may_stand_outside_the_activation_state(tmp_path):
    content = openai_content(random_sae())
    del content["activation_state_dict"]
    torch.save({**content, "activation.k": 3, "activation.postact_fn": "ReLU"}, tmp_path / "sae.pt")
    assert SparseAutoencoder.load(tmp_path / "sae.pt").k == 3


def test_sparsify_folder_subtracts_b_dec_and_does_not_normalise(tmp_path):
    sae, x = random_sae(normalize=False), activations(9)
    loaded = SparseAutoencoder.load(sparsify_folder(tmp_path / "sae", sae))
    torch.testing.assert_close(scattered(*loaded.encode(x)), dense_latents(x, sae), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_saelens_folder_matches_the_formula(tmp_path, normalization):
    sae, x = random_sae(normalization == "layer_norm"), activations(9)
    loaded = SparseAutoencoder.load(saelens_folder(tmp_path / "sae", sae, normalize_activations=normalization))
    torch.testing.assert_close(scattered(*loaded.encode(x)), dense_latents(x, sae), rtol=1e-5, atol=1e-5)


def test_saelens_without_b_dec_at_the_input_encodes_the_input_itself(tmp_path):
    sae, x = random_sae(normalize=False), activations(9)
    loaded = SparseAutoencoder.load(
        saelens_folder(tmp_path / "sae", sae, normalize_activations="none", apply_b_dec_to_input=False)
    )
    pre = x.double() @ sae.W_enc.double().T + sae.latent_bias.double()
    values, indices = pre.topk(K)
    latents = scattered(values.relu(), indices)
    torch.testing.assert_close(scattered(*loaded.encode(x)), latents, rtol=1e-5, atol=1e-4)
    expected = latents @ sae.decoder.double() + sae.pre_bias.double()
    torch.testing.assert_close(loaded(x).double(), expected, rtol=1e-5, atol=1e-3)


def test_saelens_k_may_stand_in_activation_fn_kwargs(tmp_path):
    folder = saelens_folder(tmp_path / "sae", random_sae(), activation_fn_kwargs={"k": 4})
    config = json.loads((folder / "cfg.json").read_text())
    del config["k"]
    (folder / "cfg.json").write_text(json.dumps(config))
    assert SparseAutoencoder.load(folder).k == 4


@pytest.mark.parametrize("normalize", [True, False])
def test_saving_and_loading_changes_nothing(tmp_path, normalize):
    sae = random_sae(normalize)
    sae.save(tmp_path / "deep" / "sae", metrics={"l0": 5.0})
    loaded = SparseAutoencoder.load(tmp_path / "deep" / "sae")
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), loaded.parameters(), strict=True))
    assert (loaded.k, loaded.normalization) == (K, sae.normalization)
    config = json.loads((tmp_path / "deep" / "sae" / "config.json").read_text())
    assert config["format"] == "cocomix-sae" and config["metrics"] == {"l0": 5.0}


def test_a_failed_save_leaves_the_old_sae_untouched(tmp_path, monkeypatch):
    random_sae().save(tmp_path / "sae")
    before = SparseAutoencoder.load(tmp_path / "sae").fingerprint()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cocomix.teacher.sae.to_safetensors", fail)
    with pytest.raises(CocomixError, match="no room on disk"):
        random_sae(seed=1).save(tmp_path / "sae")
    assert SparseAutoencoder.load(tmp_path / "sae").fingerprint() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["sae"]


def test_fingerprint_is_of_the_numbers_and_not_of_the_format(tmp_path):
    sae = random_sae()
    sae.save(tmp_path / "own")
    torch.save(openai_content(sae), tmp_path / "sae.pt")
    saelens_folder(tmp_path / "saelens", sae)
    prints = {SparseAutoencoder.load(tmp_path / name).fingerprint() for name in ("own", "sae.pt", "saelens")}
    assert prints == {sae.fingerprint()}


def test_fingerprint_tells_settings_and_numbers_apart():
    sae = random_sae()
    numbers = [p.detach().clone() for p in sae.parameters()]
    other_k = SparseAutoencoder(*numbers, K + 1, normalize=True)
    other_normalisation = SparseAutoencoder(*numbers, K, normalize=False)
    other_number = random_sae()
    with torch.no_grad():
        other_number.decoder[3, 2] += 1e-3
    assert len({s.fingerprint() for s in (sae, other_k, other_normalisation, other_number)}) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transcode": True}, "transcode"),
        ({"skip_connection": True}, "skip_connection"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "signed"),
        ({"k": C + 1}, f"k is {C + 1}"),
    ],
)
def test_sparsify_variants_are_refused_by_name(tmp_path, change, words):
    with pytest.raises(CocomixError, match=words):
        SparseAutoencoder.load(sparsify_folder(tmp_path / "sae", random_sae(), **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "gated"}, "gated.*topk, standard and jumprelu are"),
        ({"architecture": "jumprelu"}, "missing threshold"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, "tanh-relu.*relu and topk are"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in.*layer_norm.*fold them"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"hook_name": "blocks.0.attn.hook_z"}, "attention heads"),
        ({"k": None}, "cfg.json names no k"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_saelens_variants_are_refused_by_name(tmp_path, change, words):
    with pytest.raises(CocomixError, match=words):
        SparseAutoencoder.load(saelens_folder(tmp_path / "sae", random_sae(), **change))


def test_a_tensor_that_a_plain_sae_lacks_is_refused(tmp_path):
    folder = sparsify_folder(tmp_path / "sae", random_sae())
    (folder / "sae.safetensors").unlink()
    sae = random_sae()
    save_file(
        {
            "encoder.weight": sae.W_enc.detach(),
            "encoder.bias": sae.latent_bias.detach(),
            "W_dec": sae.decoder.detach(),
            "b_dec": sae.pre_bias.detach(),
            "W_skip": torch.eye(D),
        },
        folder / "sae.safetensors",
    )
    with pytest.raises(CocomixError, match="W_skip"):
        SparseAutoencoder.load(folder)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(CocomixError, match="no SAE at .*nowhere"):
        SparseAutoencoder.load(tmp_path / "nowhere")


def test_unknown_folder_says_what_was_found_and_what_is_supported(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CocomixError, match="model.safetensors.*supported.*SAELens"):
        SparseAutoencoder.load(tmp_path)


def test_a_folder_of_several_saes_asks_for_one(tmp_path):
    sparsify_folder(tmp_path / "layers.5", random_sae())
    with pytest.raises(CocomixError, match="several SAEs.*layers.5"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"weight": torch.ones(2)}], ids=["list", "dict"])
def test_a_torch_file_without_an_sae_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "sae.pt")
    with pytest.raises(CocomixError, match="not an SAE"):
        SparseAutoencoder.load(tmp_path / "sae.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "Identity"}, "'Identity'; TopK and ReLU"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "Identity"),
        ({"activation_state_dict": {}}, "k is missing"),
        ({"pre_bias": None}, "missing pre_bias"),
        ({"pre_bias": torch.zeros(D + 1)}, "contradict"),
        ({"latent_bias": torch.zeros(C - 1)}, "contradict"),
        ({"decoder.weight": torch.zeros(C, D)}, "contradict"),
        ({"latent_bias": torch.full((C,), torch.nan)}, "NaN"),
        ({"activation_state_dict": {"k": C + 1, "postact_fn": "ReLU"}}, f"k is {C + 1}"),
    ],
)
def test_broken_openai_files_say_what_is_wrong(tmp_path, change, words):
    torch.save(openai_content(random_sae()) | change, tmp_path / "sae.pt")
    with pytest.raises(CocomixError, match=words):
        SparseAutoencoder.load(tmp_path / "sae.pt")


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))], ids=["torch", "pickle"])
def test_a_file_that_needs_unpickling_is_refused_and_its_code_not_run(tmp_path, write):
    write({"encoder.weight": RunsCode(tmp_path / "marker")}, tmp_path / "sae.pt")
    with pytest.raises(CocomixError, match="needs unpickling.*refused"):
        SparseAutoencoder.load(tmp_path / "sae.pt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("keep", [0, 10, 3000, 30000])
def test_a_truncated_openai_file_is_reported(tmp_path, keep):
    (tmp_path / "sae.pt").write_bytes(GOLDEN.read_bytes()[:keep])
    with pytest.raises(CocomixError, match="sae.pt"):
        SparseAutoencoder.load(tmp_path / "sae.pt")


def test_text_in_place_of_a_torch_file_is_reported(tmp_path):
    (tmp_path / "sae.pt").write_text("<html>not found</html>")
    with pytest.raises(CocomixError, match="sae.pt"):
        SparseAutoencoder.load(tmp_path / "sae.pt")


@pytest.mark.parametrize("keep", [0, 4, 200, 1000])
def test_truncated_safetensors_are_reported(tmp_path, keep):
    random_sae().save(tmp_path / "sae")
    file = tmp_path / "sae" / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CocomixError, match="truncated"):
        SparseAutoencoder.load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"version": 2}, "version 2.*reads version 1"),
        ({"n_latents": C + 1}, "not of one SAE"),
        ({"k": "many"}, "config.json: Expected `int`, got `str` - at `\\$.k`"),
        ({"k": None}, "config.json: Expected `int`, got `null` - at `\\$.k`"),
        ({"normalize": "batch"}, "normalisation is 'batch'; known are none, layer_norm"),
    ],
)
def test_own_config_that_contradicts_the_tensors_is_refused(tmp_path, change, words):
    random_sae().save(tmp_path)
    change_json(tmp_path / "config.json", change)
    (tmp_path / "cocomix_checksums.json").unlink()
    with pytest.raises(CocomixError, match=words):
        SparseAutoencoder.load(tmp_path)
