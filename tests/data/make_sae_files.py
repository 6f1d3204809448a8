"""Makes tests/data/saes: small autoencoders in the formats of other programs, and what those programs encode with them.

    python -m venv venv && venv/bin/pip install sae-lens==6.54.12 eai-sparsify==1.3.3
    venv/bin/python tests/data/make_sae_files.py

The tests need neither library: they read the files and compare. OpenAI's program is not on PyPI; its files are written
as it writes them, and `_openai_encode` is its formula in float64.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sparsify import SparseCoder, SparseCoderConfig

FOLDER = Path(__file__).parent / "saes"
C, D, K, N = 40, 12, 5, 16


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(N, D)
    expected = {"x": x.numpy()}
    for name, (latents, reconstruction) in {**_openai(x), **_sparsify(x), **_saelens(x)}.items():
        expected[f"{name}.latents"] = latents.detach().float().numpy()
        expected[f"{name}.reconstruction"] = reconstruction.detach().float().numpy()
        print(f"{name}: {(latents > 0).sum(1).float().mean():.1f} active latents a token")
    np.savez_compressed(FOLDER / "expected.npz", **expected)


def _openai(x):
    found = {}
    for activation in ("TopK", "ReLU"):
        content = {"pre_bias": torch.randn(D), "latent_bias": torch.randn(C), "encoder.weight": torch.randn(C, D),
                   "decoder.weight": torch.randn(D, C), "stats_last_nonzero": torch.zeros(C, dtype=torch.long),
                   "activation": activation}
        if activation == "TopK":
            content["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
        name = f"openai_{activation.lower()}.pt"
        torch.save(content, FOLDER / name)
        found[name] = _openai_encode(content, x.double())
    return found


def _openai_encode(content, x):
    mean = std = None
    if content["activation"] == "TopK":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pre = (x - content["pre_bias"]) @ content["encoder.weight"].double().T + content["latent_bias"]
    if mean is not None:
        kept = pre.topk(K, -1)
        pre = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
    latents = pre.relu()
    reconstruction = latents @ content["decoder.weight"].double().T + content["pre_bias"]
    return latents, reconstruction if mean is None else reconstruction * std + mean


def _sparsify(x):
    coder = SparseCoder(D, SparseCoderConfig(num_latents=C, k=K))
    _randomize(coder)
    coder.save_to_disk(FOLDER / "sparsify")
    coder = SparseCoder.load_from_disk(FOLDER / "sparsify")
    values, indices, _ = coder.encode(x)
    return {"sparsify": (torch.zeros(N, C).scatter(-1, indices, values), coder(x).sae_out)}


def _saelens(x):
    size = {"d_in": D, "d_sae": C}
    found = {}
    for name, sae in {
        "saelens_topk": TopKSAE(TopKSAEConfig(**size, k=K)),
        "saelens_topk_layer_norm": TopKSAE(TopKSAEConfig(**size, k=K, normalize_activations="layer_norm")),
        "saelens_topk_rescaled": TopKSAE(TopKSAEConfig(**size, k=K, rescale_acts_by_decoder_norm=True,
                                                       apply_b_dec_to_input=False)),
        "saelens_standard": StandardSAE(StandardSAEConfig(**size)),
        "saelens_standard_constant_norm": StandardSAE(StandardSAEConfig(
            **size, normalize_activations="constant_norm_rescale", apply_b_dec_to_input=False)),
        "saelens_jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**size)),
        "saelens_jumprelu_layer_norm": JumpReLUSAE(JumpReLUSAEConfig(
            **size, normalize_activations="layer_norm", apply_b_dec_to_input=False)),
    }.items():
        _randomize(sae)
        sae.save_model(FOLDER / name)
        found[name] = _saelens_encode(name, x)
    shutil.copytree(FOLDER / "saelens_topk", FOLDER / "saelens_topk_5")
    _rewrite_as_version_5(FOLDER / "saelens_topk_5" / "cfg.json")
    found["saelens_topk_5"] = _saelens_encode("saelens_topk_5", x)
    return found


def _saelens_encode(name, x):
    sae = SAE.load_from_disk(FOLDER / name)
    return sae.encode(x), sae(x)


def _rewrite_as_version_5(path):
    """Before SAELens 6 a TopK SAE was a standard one with another activation."""
    config = json.loads(path.read_text())
    for key in ("k", "metadata", "rescale_acts_by_decoder_norm"):
        del config[key]
    config |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
               "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "hook_head_index": None, "context_size": 8,
               "model_name": "gpt2", "dataset_path": "", "prepend_bos": True, "finetuning_scaling_factor": False,
               "sae_lens_training_version": "5.3.0", "neuronpedia_id": None, "dataset_trust_remote_code": True,
               "model_from_pretrained_kwargs": {}, "normalize_activations": "none"}
    path.write_text(json.dumps(config))


def _randomize(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.rand_like(parameter) * 4 if name == "threshold" else torch.randn_like(parameter))


if __name__ == "__main__":
    main()
