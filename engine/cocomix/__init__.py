"""CoCoMix: pretraining language models with continuous concepts (arXiv 2502.08524)."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:  # what `__getattr__` gives, for editors and type checkers
    from cocomix.inference.steering import steer
    from cocomix.model.config import CoCoMixConfig
    from cocomix.model.model import CoCoMixForCausalLM, CoCoMixModel
    from cocomix.teacher.concept_teacher import ConceptTeacher
    from cocomix.teacher.label_cache import LabelCache
    from cocomix.teacher.sae import SparseAutoencoder

_PUBLIC = {
    "CoCoMixConfig": "cocomix.model.config",
    "CoCoMixForCausalLM": "cocomix.model.model",
    "CoCoMixModel": "cocomix.model.model",
    "SparseAutoencoder": "cocomix.teacher.sae",
    "ConceptTeacher": "cocomix.teacher.concept_teacher",
    "LabelCache": "cocomix.teacher.label_cache",
    "steer": "cocomix.inference.steering",
}
__all__ = [
    "CoCoMixConfig",
    "CoCoMixForCausalLM",
    "CoCoMixModel",
    "ConceptTeacher",
    "LabelCache",
    "SparseAutoencoder",
    "steer",
]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "__version__":
        return importlib.metadata.version("cocomix")
    raise AttributeError(f"module 'cocomix' has no attribute {name!r}")


# Registers the model with transformers' Auto classes, without making everyone who imports cocomix wait for them.
@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register(_):
    importlib.import_module("cocomix.model.model")
