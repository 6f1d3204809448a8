"""Training through the Triton kernels follows the trajectory of the PyTorch backend."""

import pytest
import torch

from cocomix_kernels.attention import triton_kernel as attention
from cocomix_kernels.attribution import triton_kernel as attribution
from cocomix_kernels.common import sparse_rows as sparse
from cocomix_kernels.concept_head import triton_cross_entropy as cross_entropy
from cocomix_kernels.concept_head import triton_selection as selection
from cocomix_kernels.concept_mix import triton_kernel as mix

STEPS, WINDOWS = 3, 2


def overrides(world, labels):
    source = [f"concept_labels.cache={world.folder}/labels"] if labels == "cached" else []
    return [f"train.tokens={STEPS * WINDOWS * 16}", f"train.global_batch={WINDOWS}", f"train.micro_batch={WINDOWS}",
            "train.eval_every=1000", "train.eval_windows=1", *source]  # fmt: skip


def note_launches(monkeypatch, *modules):
    """The set of names, filled later, of the kernels that these modules start."""
    started = set()
    for module in modules:

        def launch(kernel, *arguments, start=module.launch, **options):
            started.add(kernel.__name__)
            start(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", launch)
    return started


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["cached", "online"])
def test_losses_and_weights_equal_those_of_the_torch_backend(world, labels, monkeypatch):
    started = note_launches(monkeypatch, attention, attribution, cross_entropy, mix, selection, sparse)
    for backend in ("torch", "triton"):
        monkeypatch.setenv("COCOMIX_BACKEND", backend)
        assert world.train(f"{labels}-{backend}", *overrides(world, labels)) == 0
        assert bool(started) == (backend == "triton")
    of_head, of_mixing = {"_row_topk_kernel", "_gradient_kernel", "_weighted_rows"}, {"_mix", "_mix_gradients"}
    of_attention = {"_forward", "_backward_queries", "_backward_keys"}
    assert of_head | of_mixing | of_attention | {"_scatter_pieces"} <= started
    assert ("_attribution_labels" in started) == (labels == "online")
    for key in ("loss", "ntp_loss", "concept_loss", "grad_norm"):
        plain, fused = (torch.tensor(world.losses(f"{labels}-{backend}", key)) for backend in ("torch", "triton"))
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    plain, fused = (world.weights(f"{labels}-{backend}") for backend in ("torch", "triton"))
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-4, atol=1e-4)
