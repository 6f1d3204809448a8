"""What a user of a trained model names, loaded and checked: the model with its tokenizer, and its run's teacher."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cocomix.core.config import TeacherConfig, load_config
from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.methods import predicts_concepts
from cocomix.data.tokenizer import load_tokenizer
from cocomix.distributed.export import description_folder, is_checkpoint, is_run, load_model, read_model, run_of
from cocomix.inference.concept_names import FILE
from cocomix.training.run_places import find_part

if TYPE_CHECKING:
    import torch

_VOCABULARY_MULTIPLE = 256  # vocabularies are padded to a multiple of 64, 128 or 256, for the sake of the products
_NAME_ANOTHER = "name the right one in a config file with --teacher-config"


class UsableModel(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the folder where names of its concepts are kept."""

    model: Any
    tokenizer: Any
    names_folder: Path

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None where it knows no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)


def load_usable(path, device: "torch.device | str" = "cpu") -> UsableModel:
    """The model and the tokenizer of a run, a checkpoint or a transformers folder.

    Raises `CocomixError` where there is none, or where the two do not belong together.
    """
    usable = read_model(path, _load)
    return usable._replace(model=usable.model.to(device))


def _load(found: Path) -> UsableModel:
    folder = description_folder(found)
    tokenizer = load_tokenizer(str(folder))
    model = cast(Any, load_model(found))
    n_ids, vocab_size = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if not 0 <= vocab_size - n_ids < _VOCABULARY_MULTIPLE:
        raise CocomixError(
            f"{folder} holds a tokenizer of {n_ids} ids, but its model was made for {vocab_size}: put "
            "the tokenizer there that the model was trained with"
        )
    return UsableModel(model, tokenizer, _names_folder(found))


def _names_folder(found: Path) -> Path:
    """Beside the model; but beside a run that is or was unfinished when it got names, whose checkpoints come and go."""
    if is_checkpoint(found):
        return found.parents[1]
    return found.parent if is_run(found.parent) and (found.parent / FILE).is_file() else found


def run_settings(path, section: str) -> dict:
    """A section of the config of the run that a model lies in, as `run.json` has it; empty where there is none."""
    run = run_of(path)
    if run is None:
        return {}
    config = read_json(run / "run.json", "the run's description").get("config") or {}
    return config.get(section) or {}


def _teacher_of_run(path) -> TeacherConfig:
    run = run_of(path)
    if run is None:
        return TeacherConfig()
    known = {field.name for field in dataclasses.fields(TeacherConfig)}
    settings = {key: value for key, value in run_settings(path, "teacher").items() if key in known}
    settings |= {key: find_part(run, f"teacher.{key}", _NAME_ANOTHER) for key in ("model", "sae")}
    return TeacherConfig(**settings)


def _require_same_teacher(run: Path, teacher) -> None:
    """Raise `CocomixError` where the run's labels are known to be from another teacher or SAE."""
    stored = read_json(run / "run.json", "the run's description").get("teacher_fingerprints")
    if not isinstance(stored, dict) or not stored:
        return
    found = teacher.fingerprints()
    if stored.get("dtype") != found["dtype"]:
        return
    for name, key in (("teacher", "teacher.model"), ("sae", "teacher.sae")):
        if stored.get(name) not in (None, found[name]):
            raise CocomixError(f"{run} was trained with another {key} than what is in its place now: {_NAME_ANOTHER}")


def load_teacher(path, config_path, usable: UsableModel):
    """The `ConceptTeacher` of a config file or else of the run that the model at `path` lies in.

    Raises `CocomixError` where there is none, where it cannot be loaded, and where its SAE or vocabulary do not fit
    the model.
    """
    from cocomix.teacher.concept_teacher import ConceptTeacher

    if config_path is not None:
        section = load_config(config_path).teacher
    else:
        section = _teacher_of_run(path)
        if not section.model or not section.sae:
            raise CocomixError(
                f"{path} does not say which teacher and SAE its labels come from: name a config file with "
                "--teacher-config"
            )
    model = usable.model
    teacher = ConceptTeacher.from_config(section, model.device)
    run = run_of(path)
    if config_path is None and run is not None:
        _require_same_teacher(run, teacher)
    if teacher.model.config.vocab_size < max(usable.tokenizer.get_vocab().values()) + 1:
        raise CocomixError(
            f"the teacher {section.model} knows {teacher.model.config.vocab_size} ids, fewer than the "
            "model's tokenizer makes: it belongs to another tokenizer"
        )
    if predicts_concepts(getattr(model.config, "mixing", "none")) and teacher.sae.n_latents != model.config.concept_dim:
        raise CocomixError(
            f"the SAE {section.sae} has {teacher.sae.n_latents} latents but the model "
            f"{model.config.concept_dim} concepts: it was trained with another SAE"
        )
    return teacher
