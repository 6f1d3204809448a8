"""What may change between the parts of one run, and what would make it another run."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import cocomix_kernels as kernels
from cocomix.core.config import Config, current_name
from cocomix.core.errors import CocomixError
from cocomix.core.origin import differences
from cocomix.core.precision import STUDENT, TEACHER
from cocomix.distributed.checkpoint import latest_checkpoint, read_trainer_state
from cocomix.teacher.supervision import cached_precision, wanted_kinds

# Settings that leave a run's trajectory alone (up to rounding, where the work is split otherwise), with all below them.
LEAVES_TRAJECTORY = (
    "out",
    "data.folder",
    "data.text",
    "data.tokens",
    "data.text_key",
    "data.document_separator",
    "data.on_bad_record",
    "data.max_bad_share",
    "data.tokenizer",
    "data.vocab_size",
    "data.max_tokens",
    "data.shuffle_documents",
    "data.shuffle_seed",
    "data.processes",
    "data.val_fraction",
    "teacher.model",
    "teacher.sae",
    "sae",
    "concept_labels",
    "distillation.cache",
    "train.run",
    "train.micro_batch",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.activation_checkpointing",
    "train.compile",
    "train.attention_backend",
    "train.log_every",
    "train.eval_every",
    "train.eval_windows",
    "train.save_every",
    "train.keep_checkpoints",
    "train.continue_after_failed_save",
    "train.max_skipped_steps",
    "train.spike_deviations",
    "train.tensorboard",
    "train.wandb_project",
    "train.timeout_minutes",
    "deepspeed",
)
# Settings that a resumed run may change: those, and what steers it on purpose.
MAY_CHANGE = (
    *LEAVES_TRAJECTORY,
    "train.tokens",
    "train.lr",
    "train.schedule",
    "train.decay_share",
    "train.min_lr_ratio",
    "train.warmup_steps",
    "train.grad_clip",
)

# What a run may change beside those where it begins with one of next-token prediction and adds concept layers to it.
GROWS_BY = (
    "model.mixing",
    "model.concept_dim",
    "model.concept_topk",
    "model.insert_layer",
    "model.concept_loss_weight",
    "model.concept_residual",
    "model.concept_every",
    "teacher",
    "the labels' labels_by",
)


def settings(config: Config) -> dict:
    """Every setting by its full name; the `deepspeed` section is one value."""
    flat = {}
    for section, value in dataclasses.asdict(config).items():
        if section == "deepspeed" or not isinstance(value, dict):
            flat[section] = value
        else:
            flat |= {f"{section}.{key}": inner for key, inner in value.items()}
    return flat


def identity(config: Config, text_fingerprint: str, supervision_fingerprints: dict[str, str]) -> dict:
    """What decides about the trajectory, and all settings, as JSON values by name: what a resumed run is compared by,
    and what all ranks must agree on."""
    return {**settings(config), "the text's fingerprint": text_fingerprint, **supervision_fingerprints}


def code_fingerprint() -> str:
    """SHA-256 over this package's own source files, hexadecimal."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for root in (package, Path(kernels.__file__).parent):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def precision_begun_with(config: Config, source: Path | None = None) -> dict[str, str]:
    """What the caches and the newest checkpoint of the config's run say of its precisions, by the settings' names;
    where it has none yet, that of `source`, the run that it begins with."""
    checkpoint = latest_checkpoint(config.train.run) or (source and latest_checkpoint(source))
    stored = {} if checkpoint is None else read_trainer_state(checkpoint)["identity"]
    # A run of next-token prediction has a precision of a teacher that it does not use.
    names = (STUDENT,) if grows(stored, settings(config)) else (STUDENT, TEACHER)
    of_run = {name: stored[name] for name in names if name in stored}
    return cached_precision(config, wanted_kinds(config)) | of_run


def grows(stored: dict, now: dict) -> bool:
    """Whether `stored` are settings of next-token prediction and `now` those of a student with concept layers."""
    return stored.get("model.mixing") == "none" != now["model.mixing"]


def require_same_run(stored: dict, now: dict, checkpoint, branches: bool = False) -> list[str]:
    """Raise `CocomixError`, naming what differs, unless a run with the settings and fingerprints `now` continues the
    one that `stored` them. Returns the changes that are allowed, in words. A run that `branches` may also add concept
    layers to a student of next-token prediction.

    Both map names to JSON values. A setting that came with a later version than `stored` had its default then. What
    else only one of them has is not compared: the fingerprints of a teacher, for example, are not always known.
    """
    stored = {current_name(name): value for name, value in stored.items()}
    stored = {**settings(Config()), "the labels' labels_by": "attribution", **stored}
    changes = differences(stored, now, [name for name in now if name in stored])
    allowed = (*MAY_CHANGE, *GROWS_BY) if branches and grows(stored, now) else MAY_CHANGE
    refused = [str(change) for change in changes if not _is_among(change.name, allowed)]
    if refused:
        raise CocomixError(
            f"{checkpoint} cannot be resumed: {'; '.join(refused)}. Use what the run was started with, or another "
            "train.run"
        )
    return [str(change) for change in changes]


def _is_among(name: str, allowed: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)
