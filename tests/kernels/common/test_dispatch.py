"""Which backend runs: an explicit one is a demand, the environment's a preference."""

import pytest
import torch

from cocomix_kernels import (
    TopTargets,
    concept_attribution,
    concept_head,
    concept_mix,
    interleaved_attention,
    linear_cross_entropy,
    linear_distillation,
    topk_linear,
)
from cocomix_kernels.common.dispatch import choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOTH = {"torch": "the torch function", "triton": "the triton function"}
TORCH = {"torch": "the torch function"}


def _calls():
    x, weight, bias = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    values, indices, labels = torch.randn(4, 2), torch.randint(5, (4, 2)), torch.randint(5, (4,))
    hidden, narrow, statistic = x[None], torch.randn(3), torch.rand(1, 4, 1)
    heads = torch.randn(1, 4, 1, 3)
    return {
        "concept_head": lambda **b: concept_head(x, weight, bias, 2, labels[:, None], **b),
        "topk_linear": lambda **b: topk_linear(x, weight, bias, 2, **b),
        "concept_attribution": lambda **b: concept_attribution(values, indices, x, weight, 2, **b),
        "concept_mix": lambda **b: concept_mix(
            hidden, values[None], indices[None], weight, narrow, narrow, statistic, statistic, **b
        ),
        "interleaved_attention": lambda **b: interleaved_attention(heads, heads, heads, **b),
        "linear_cross_entropy": lambda **b: linear_cross_entropy(x, weight, labels, **b),
        "linear_distillation": lambda **b: linear_distillation(
            x, weight, labels, TopTargets(labels[:, None], narrow.new_full((4, 1), -1.0)), 0.5, **b
        )[0],
    }


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch):
    monkeypatch.delenv("COCOMIX_BACKEND", raising=False)


@pytest.mark.parametrize(
    ("device", "implementations", "expected"),
    [(CPU, BOTH, "torch"), (CUDA, BOTH, "triton"), (CUDA, TORCH, "torch"), (CPU, TORCH, "torch")],
)
def test_by_default_triton_runs_on_cuda_where_it_exists(device, implementations, expected):
    assert choose_backend("op", implementations, None, device) == f"the {expected} function"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_environment_is_preferred_to_the_default_and_an_argument_to_both(monkeypatch, backend, device):
    monkeypatch.setenv("COCOMIX_BACKEND", backend)
    assert choose_backend("op", BOTH, None, device) == f"the {backend} function"
    for demanded in BOTH:
        assert choose_backend("op", BOTH, demanded, device) == f"the {demanded} function"


def test_an_empty_environment_variable_is_no_preference(monkeypatch):
    monkeypatch.setenv("COCOMIX_BACKEND", "")
    assert choose_backend("op", BOTH, None, CPU) == "the torch function"


def test_the_environments_preference_falls_back_to_torch(monkeypatch):
    monkeypatch.setenv("COCOMIX_BACKEND", "triton")
    assert choose_backend("op", TORCH, None, CPU) == "the torch function"
    assert _calls()["linear_cross_entropy"]().isfinite()


def test_a_demanded_backend_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="op: no triton backend exists for this operation; available: torch"):
        choose_backend("op", TORCH, "triton", CPU)
    for name in ("linear_cross_entropy", "linear_distillation"):
        with pytest.raises(ValueError, match=f"{name}: no triton backend"):
            _calls()[name](backend="triton")


def test_a_library_that_one_operation_knows_is_for_an_argument_or_its_own_default(monkeypatch):
    more = BOTH | {"library": "the library function"}
    assert choose_backend("op", more, "library", CUDA) == "the library function"
    assert choose_backend("op", more, None, CUDA, "library") == "the library function"
    assert choose_backend("op", TORCH, None, CUDA, "library") == "the torch function"
    with pytest.raises(ValueError, match="op: the library backend needs CUDA tensors, these are on cpu"):
        choose_backend("op", more, "library", CPU)
    with pytest.raises(ValueError, match="backend is 'other', expected one of torch, triton, library"):
        choose_backend("op", more, "other", CUDA)
    monkeypatch.setenv("COCOMIX_BACKEND", "triton")
    assert choose_backend("op", more, None, CUDA, "library") == "the triton function"
    monkeypatch.setenv("COCOMIX_BACKEND", "library")
    with pytest.raises(ValueError, match="COCOMIX_BACKEND is 'library', expected one of torch, triton$"):
        choose_backend("op", more, None, CUDA)


@pytest.mark.parametrize("operation", _calls())
def test_every_operation_takes_torch_and_refuses_an_unknown_backend(operation, monkeypatch):
    call = _calls()[operation]
    call(backend="torch")
    with pytest.raises(ValueError, match=f"{operation}: backend is 'cuda', expected one of torch, triton"):
        call(backend="cuda")
    monkeypatch.setenv("COCOMIX_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=f"{operation}: COCOMIX_BACKEND is 'cudnn'"):
        call()
