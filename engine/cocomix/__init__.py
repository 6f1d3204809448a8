"""CoCoMix: pretraining language models with continuous concepts (arXiv 2502.08524)."""

import importlib

import wrapt

_PUBLIC = {
    "CoCoMixConfig": "cocomix.model.model",
    "CoCoMixForCausalLM": "cocomix.model.model",
    "CoCoMixModel": "cocomix.model.model",
    "SparseAutoencoder": "cocomix.teacher.sae",
    "ConceptTeacher": "cocomix.teacher.concept_teacher",
    "LabelCache": "cocomix.teacher.label_cache",
    "steer": "cocomix.inference.steering",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'cocomix' has no attribute {name!r}")


# Registers the model with transformers' Auto classes, without making everyone who imports cocomix wait for them.
@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register(_):
    importlib.import_module("cocomix.model.model")
