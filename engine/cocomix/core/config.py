"""Settings: dataclasses, YAML files over them, `key.sub=value` overrides, and their validation."""

# Default factories of lists and mappings have no types.
# pyright: reportUnknownVariableType=false

import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cocomix.core.checks import checked, fits_64_bits, not_negative, one_of, positive, problems
from cocomix.core.errors import CocomixError
from cocomix.core.files import AnyPath
from cocomix.core.methods import MIXING, predicts_concepts
from cocomix.core.model_names import first_line
from cocomix.core.output import encodable
from cocomix.core.yaml_files import load_yaml, require_shallow

LABELS_BY = ("attribution", "activation")
ATTENTION_BACKENDS = ("torch", "triton", "flash", "cudnn")
PRECISIONS = ("fp32", "bf16")
AUTO = "auto"  # a precision that the machine decides, see `cocomix.core.precision`
ON_BAD_RECORD = ("stop", "skip")
ZERO_STAGES = (0, 1, 2, 3)
SCHEDULES = ("cosine", "linear", "wsd", "constant")  # of the learning rate after its warm-up

_TEXT = (str, str | None)
RENAMED = {"labels": "concept_labels"}  # sections by the names that they had in earlier versions, which are still read


@dataclass
class DataConfig:
    """Text, tokenizer and token files."""

    folder: str = "data"  # train.bin, val.bin, meta.json and tokenizer/ live here
    # files, folders, "stdlib", "hf:NAME[:SPLIT[:SUBSET]]", or mappings {path: ..., weight: ..., text_key: ...}
    text: list[Any] = field(default_factory=list)
    # instead of text: token files that other programs made with `tokenizer`, or folders of them
    tokens: list[str] = field(default_factory=list)
    text_key: str = "text"  # the field of JSON records, or the column of tables, that holds the text
    # what stands between documents in one file of plain text, for example "<|endoftext|>"; null: nothing does
    document_separator: str | None = checked(None, lambda text: text != "", "must not be empty: null for none")
    # a record that cannot be read: stop | skip, which leaves it out, counts it and says so
    on_bad_record: str = one_of("stop", ON_BAD_RECORD)
    # skip: where more than this share of a source's records are bad, stop all the same
    max_bad_share: float = checked(0.05, lambda share: 0 <= share <= 1, "must lie between 0 and 1")
    tokenizer: str | None = None  # a folder, or hf:NAME on the hub; none: train a byte-level BPE on the text
    # of a tokenizer that is trained here
    vocab_size: int = positive(4096, at_most=2**31, because="token files hold 32 bits")
    max_tokens: int = not_negative(0)  # stop after the document that reaches so many tokens; 0: take all text
    # put the training documents into a random order, where they come sorted; validation keeps its own
    shuffle_documents: bool = False
    shuffle_seed: int = checked(0, fits_64_bits, "must fit into 64 bits")
    # that tokenize, which together use all cores; several are faster where there are many cores
    processes: int = positive(1)
    # share of the text, in whole documents, that is held out for validation
    val_fraction: float = checked(0.05, lambda share: 0 < share < 1, "must lie between 0 and 1")
    # T: tokens in a window
    seq_len: int = checked(1024, lambda n: n >= 2, "must be at least 2: a window needs a next token to predict")


@dataclass
class ModelConfig:
    """Shape of the student. The vocabulary comes from the token files, the context length from data.seq_len."""

    n_embd: int = positive(512)
    n_layer: int = positive(8, at_most=2**16, because="a model's weights are listed")
    n_head: int = positive(8)
    concept_dim: int = positive(32768)
    concept_topk: int = positive(32)
    insert_layer: int = 3
    concept_loss_weight: float = not_negative(0.1, at_most=1e30, because="losses are numbers of 32 bits")
    # or add, predict (without mixing), pause (a learned vector instead), none (NTP)
    mixing: str = one_of("interleave", MIXING)
    # interleave and pause: what stands at a concept position is added to its token's hidden state
    concept_residual: bool = False
    # interleave and pause: a concept position after every so many tokens
    concept_every: int = positive(1)


@dataclass
class TeacherConfig:
    """The frozen side: a causal language model, the block its SAE reads, and the SAE."""

    model: str | None = None  # a transformers folder, or hf:NAME on the hub
    sae: str | None = None  # an SAE file or folder; `cocomix sae` writes it
    sae_k: int | None = None  # keep at most so many latents a token; null: a TopK SAE's own k, 32 of any other SAE
    layer: int = not_negative(5)  # m, 0-based
    label_topk: int = positive(4)  # K
    # or activation: label the largest latents, whatever they do for the next token
    labels_by: str = one_of("attribution", LABELS_BY)
    # tokens of next-token prediction, after which the student as it is then, frozen, is the teacher; 0: `model`
    self_taught_after: int = not_negative(0)
    # of the teacher's forward and backward pass; auto: by what the machine multiplies fastest
    dtype: str = one_of("fp32", (*PRECISIONS, AUTO))


@dataclass
class SaeConfig:
    """Training of the TopK sparse autoencoder (`cocomix sae`)."""

    n_latents: int = positive(32768)
    k: int = positive(32)
    tokens: int = positive(10_000_000)
    batch_tokens: int = positive(4096)
    lr: float = positive(1e-3)
    warmup_steps: int = not_negative(100)
    aux_k: int = not_negative(256)  # dead latents that help to explain the residual
    aux_weight: float = not_negative(1 / 32, at_most=1e30, because="losses are numbers of 32 bits")
    dead_after_tokens: int = positive(1_000_000)  # a latent silent for so long is dead
    seed: int = checked(0, fits_64_bits, "must fit into 64 bits")


@dataclass
class ConceptLabelsConfig:
    """Where concept labels come from: a cache, or the teacher itself while training."""

    cache: str | None = None  # a folder; `cocomix labels` writes it. None: online
    shard_windows: int = positive(4096)  # windows in one file of the cache


@dataclass
class DistillationConfig:
    """Knowledge distillation: KL(teacher || student) of next-token distributions beside the student's own loss."""

    # of that term; 0: no distillation
    weight: float = not_negative(0.0, at_most=1e30, because="losses are numbers of 32 bits")
    # of the teacher's likeliest tokens, the rest counting as one; null: all, online alone
    top_k: int | None = checked(32, lambda k: k is None or k > 0, "must be positive, or null for all")
    cache: str | None = None  # a folder; `cocomix labels` writes it. None: online


@dataclass
class TrainConfig:
    """Optimisation, schedule and bookkeeping of `cocomix train`."""

    run: str = "runs/run"  # metrics, checkpoints and the finished model
    tokens: int = positive(1_000_000_000)  # training tokens; steps = ceil(tokens / (global_batch * seq_len))
    # windows in one optimizer step, over all ranks
    global_batch: int = positive(512, at_most=2**24, because="a step's windows are listed in memory")
    micro_batch: int = positive(8)  # windows in one forward pass of one rank
    lr: float = positive(6e-4)
    schedule: str = one_of("cosine", SCHEDULES)  # of the learning rate after its warm-up, see `training.schedule`
    # wsd: the share of the steps, the last ones, in which the rate falls; before, it does not depend on `tokens`
    decay_share: float = checked(0.2, lambda share: 0 < share <= 1, "must be above 0 and at most 1")
    # the rate ends at this share of lr
    min_lr_ratio: float = checked(0.1, lambda share: 0 <= share <= 1, "must lie between 0 and 1")
    warmup_steps: int = not_negative(130)
    beta1: float = checked(0.9, lambda beta: 0 <= beta < 1, "must be at least 0 and below 1")
    beta2: float = checked(0.95, lambda beta: 0 <= beta < 1, "must be at least 0 and below 1")
    eps: float = positive(1e-8)
    weight_decay: float = not_negative(0.1)
    grad_clip: float = positive(1.0)
    # fp32 | bf16 (fp32 master weights) | auto: by what the machine multiplies fastest
    precision: str = one_of("fp32", (*PRECISIONS, AUTO))
    # DeepSpeed splits over the ranks: 1 optimizer state, 2 gradients too, 3 weights too; 0 nothing
    zero_stage: int = one_of(1, ZERO_STAGES, "0, 1, 2 or 3")
    offload_optimizer: bool = False  # optimizer state and step on the CPU
    activation_checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again when needed
    compile: bool = False  # torch.compile each block
    # over the doubled sequence: torch | triton | flash | cudnn; null: by rule
    attention_backend: str | None = one_of(None, (None, *ATTENTION_BACKENDS))
    seed: int = checked(0, fits_64_bits, "must fit into 64 bits")  # of initialisation and data order
    log_every: int = positive(10)
    eval_every: int = positive(500)
    eval_windows: int = not_negative(0)  # validation windows an evaluation reads; 0: all
    save_every: int = positive(500)
    keep_checkpoints: int = positive(2)
    continue_after_failed_save: bool = False  # a full disk: go on without that checkpoint instead of stopping
    max_skipped_steps: int = positive(10)  # steps in a row whose loss or gradient is not finite: so many end the run
    # a loss so many standard deviations above its running mean is logged; 0: none
    spike_deviations: float = not_negative(6.0)
    tensorboard: bool = True
    wandb_project: str | None = None  # log to Weights & Biases as well
    # a collective that waits longer ends the run
    timeout_minutes: float = positive(10.0, at_most=525_600, because="that is a year")


@dataclass
class Config:
    """Everything a command may need; each command reads the sections it uses."""

    out: str = "runs"  # a folder that the file's own paths can start with: run: ${out}/ntp
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    concept_labels: ConceptLabelsConfig = field(default_factory=ConceptLabelsConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # goes to DeepSpeed as it is

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step, over all ranks."""
        return self.train.global_batch * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.train.tokens / self.tokens_per_step)


def load_config(path: AnyPath, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides and validate.

    A file may name another one under `base:` (relative to itself), whose settings it then changes. A section's earlier
    name (`RENAMED`) is read with a note on stderr. Raises `CocomixError` for a missing file, an unknown key (with the
    nearest known one), a value of the wrong type, a section by two names and values that contradict each other.
    """
    notes: list[str] = []
    sources = [_read_with_base(Path(path), [], notes), *(_read_override(text, notes) for text in overrides)]
    _refuse_two_names({text.partition("=")[0].partition(".")[0] for text in overrides}, "overrides")
    if notes and os.environ.get("RANK", "0") == "0":
        print(f"note: {notes[0]}", file=sys.stderr)
    merged = OmegaConf.structured(Config)
    for source, where in sources:
        try:
            merged = OmegaConf.merge(merged, source)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None)
            reason = str(error).splitlines()[0]
            raise CocomixError(f"{where}: {key or 'config'}: {reason}") from None
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise CocomixError(f"{path}: {str(error).splitlines()[0]}") from None
    _validate(config, str(path))
    if config.teacher.self_taught_after:
        config.teacher.model, config.teacher.sae = f"{config.train.run}/first/model", f"{config.train.run}/sae"
    return config


def _read_with_base(path: Path, seen: list[Path], notes: list[str]) -> tuple[DictConfig, str]:
    place = Path(os.path.realpath(path))
    if place in seen:
        raise CocomixError(f"{path}: its `base:` leads back to itself")
    content = load_yaml(path, "config file")
    if not isinstance(content, DictConfig):
        raise CocomixError(f"{path} holds no settings: expected sections such as `model:` and `train:`")
    base = content.pop("base", None)
    content = _with_current_names(content, str(path), notes)
    _check_keys(content, Config, str(path))
    if base is not None:
        if not isinstance(base, str):
            raise CocomixError(f"{path}: `base:` must name a file, not {base}")
        parent, _ = _read_with_base(path.parent / base, [*seen, place], notes)
        content = cast(DictConfig, OmegaConf.merge(parent, content))
    return content, str(path)


def _read_override(text: str, notes: list[str]) -> tuple[DictConfig, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise CocomixError(f"override {text!r}: expected key.sub=value, for example train.lr=3e-4")
    if not encodable(text):
        raise CocomixError(f"override {text!r}: this is not UTF-8")
    try:
        if _is_literal(key, value):
            source = OmegaConf.create(_nested(key, value))
        else:
            require_shallow(value, f"override {key}=...")
            source = OmegaConf.from_dotlist([text])
    except CocomixError:
        raise
    except Exception as error:
        raise CocomixError(f"override {text!r}: {getattr(error, 'problem', None) or first_line(error)}") from None
    source = _with_current_names(source, f"override {text!r}", notes)
    _check_keys(source, Config, f"override {text!r}")
    return source, f"override {text!r}"


def _is_literal(key: str, value: str) -> bool:
    """Whether an override's value is the setting as it stands: YAML would strip a name's blanks, join its lines and
    read 007 as 7, and another folder than was named would be made."""
    section, _, name = current_name(key).rpartition(".")
    schema: Any = {"": Config, **{f.name: f.default_factory for f in dataclasses.fields(Config)}}.get(section)
    fields = dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ()
    is_text = any(f.name == name and f.type in _TEXT for f in fields)
    return is_text and value not in ("", "~", "null", "Null", "NULL") and value[0] not in "'\""


def _nested(key: str, value: str) -> dict[str, Any]:
    first, dot, rest = key.partition(".")
    return {first: _nested(rest, value) if dot else value}


def current_name(name: str) -> str:
    """The name that a section or setting ("labels.cache") of an earlier version has now."""
    section, dot, key = name.partition(".")
    return RENAMED.get(section, section) + dot + key


def _with_current_names(source: DictConfig, where: str, notes: list[str]) -> DictConfig:
    """A source's sections by their current names; `notes` gets what to tell the user."""
    old = [name for name in source if name in RENAMED]
    _refuse_two_names(source, where)
    notes += [f"{where}: `{name}` is called `{RENAMED[name]}` now; the old name is still read" for name in old]
    plain = cast(dict[str, Any], OmegaConf.to_container(source, resolve=False))
    return OmegaConf.create({RENAMED.get(name, name): value for name, value in plain.items()}) if old else source


def _refuse_two_names(sections: Container[str], where: str) -> None:
    for old, new in RENAMED.items():
        if old in sections and new in sections:
            raise CocomixError(f"{where}: `{old}` is an old name of `{new}`: use {new} alone")


def _check_keys(node: DictConfig, schema: Any, where: str, prefix: str = "") -> None:
    """Raise `CocomixError` for unknown keys, and for a section, list or mapping where something else is expected."""
    known = {f.name: f for f in dataclasses.fields(schema)}
    for key in node:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise CocomixError(f"{where}: unknown key {prefix}{key}; {hint}")
        section, value = cast(Any, known[key].default_factory), cast(dict[str, Any], OmegaConf.to_container(node))[key]
        if dataclasses.is_dataclass(section):
            if not isinstance(value, dict):
                raise CocomixError(f"{where}: {prefix}{key} is a section, not a value; write {prefix}{key}.KEY")
            _check_keys(node[key], section, where, f"{prefix}{key}.")
        elif known[key].type in _TEXT and isinstance(value, bool | int | float):
            raise CocomixError(f"{where}: {prefix}{key} is {value!r} to YAML: put it into quotes")
        elif section in (list, dict) and type(value) is not section and not _is_reference(value):
            wanted = f"a list, such as [{value}]" if section is list else "a mapping"
            raise CocomixError(f"{where}: {prefix}{key}: expected {wanted}")


def _is_reference(value: Any) -> bool:
    """Whether another setting's value is to be taken: ${data.text}."""
    return isinstance(value, str) and "${" in value


def _validate(config: Config, where: str) -> None:
    for section in dataclasses.fields(config):
        if dataclasses.is_dataclass(section.default_factory):
            for problem in problems(getattr(config, section.name)):
                raise CocomixError(f"{where}: {section.name}.{problem}")
    for problem in _contradictions(config):
        raise CocomixError(f"{where}: {problem}")


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong between settings, each of which is allowed alone."""
    yield from _model_contradictions(config.model)
    if config.model.mixing != "none" and config.model.concept_every > config.data.seq_len:
        yield (
            f"model.concept_every ({config.model.concept_every}) must be at most data.seq_len "
            f"({config.data.seq_len}): no window would have a concept position"
        )
    yield from _distillation_contradictions(config)
    yield from _self_taught_contradictions(config)
    yield from _train_contradictions(config.train)
    sae = config.sae
    if sae.k > sae.n_latents:
        yield f"sae.k ({sae.k}) must be at most sae.n_latents ({sae.n_latents})"


def _model_contradictions(model: ModelConfig) -> Iterator[str]:
    if model.n_embd % model.n_head:
        yield f"model.n_embd ({model.n_embd}) must be a multiple of model.n_head ({model.n_head})"
    if model.n_embd == 1 and model.mixing in ("interleave", "add"):
        yield "model.n_embd must be at least 2: concepts are scaled to the spread of a vector's numbers"
    if model.mixing != "none" and not 0 <= model.insert_layer < model.n_layer:
        yield (
            f"model.insert_layer ({model.insert_layer}) must be at least 0 and below model.n_layer ({model.n_layer})"
        )
    if model.concept_residual and model.mixing in ("add", "predict"):
        yield f"model.concept_residual needs concept positions, which model.mixing={model.mixing} does not have"
    if model.concept_every > 1 and model.mixing in ("add", "predict"):
        yield f"model.concept_every needs concept positions, which model.mixing={model.mixing} does not have"
    if predicts_concepts(model.mixing):
        if model.concept_topk > model.concept_dim:
            yield f"model.concept_topk ({model.concept_topk}) must be at most model.concept_dim ({model.concept_dim})"
        if model.concept_dim > 65535:
            yield "model.concept_dim must be at most 65535: label caches hold uint16"


def _distillation_contradictions(config: Config) -> Iterator[str]:
    distillation = config.distillation
    if distillation.cache is None:
        return
    if distillation.weight == 0:
        yield "distillation.cache is set but distillation.weight is 0: set the weight, or leave the cache out"
    if distillation.cache == config.concept_labels.cache:
        yield f"concept_labels.cache and distillation.cache are the same folder ({distillation.cache}): name two"
    if distillation.top_k is None:
        yield "distillation.cache needs distillation.top_k: the whole distribution of every token would fill any disk"


def _self_taught_contradictions(config: Config) -> Iterator[str]:
    teacher, model, train = config.teacher, config.model, config.train
    after = f"teacher.self_taught_after ({teacher.self_taught_after})"
    if not teacher.self_taught_after:
        return
    if not predicts_concepts(model.mixing):
        yield f"{after} needs a student that predicts concepts, which model.mixing={model.mixing} does not"
    if teacher.self_taught_after >= train.tokens:
        yield f"{after} must be below train.tokens ({train.tokens}): it would never learn from itself"
    for name, value in {
        "teacher.model": teacher.model,
        "teacher.sae": teacher.sae,
        "concept_labels.cache": config.concept_labels.cache,
    }.items():
        if value is not None:
            yield f"{after} and {name} ({value}) are both set: set {name}=null, for the run makes its own"
    if config.distillation.weight:
        yield f"{after} and distillation.weight ({config.distillation.weight}) are both set: choose one"
    if teacher.layer >= model.n_layer:
        yield f"teacher.layer ({teacher.layer}) must be below model.n_layer ({model.n_layer}): it teaches itself"
    if config.sae.n_latents != model.concept_dim:
        yield (
            f"sae.n_latents ({config.sae.n_latents}) must be model.concept_dim ({model.concept_dim}): the student "
            "learns the latents of its own SAE"
        )
    if train.schedule not in ("wsd", "constant"):
        yield (
            f"{after} needs train.schedule=wsd or constant, for {train.schedule} lowers the learning rate from the "
            "start"
        )


def _train_contradictions(train: TrainConfig) -> Iterator[str]:
    if train.global_batch % train.micro_batch:
        yield f"train.global_batch ({train.global_batch}) must be a multiple of train.micro_batch ({train.micro_batch})"
    if train.zero_stage == 0 and train.precision == "bf16":
        yield (
            "train.precision=bf16 needs train.zero_stage 1, 2 or 3: at stage 0 DeepSpeed takes a spurious optimizer "
            "step while it initialises"
        )
    if train.zero_stage == 0 and train.offload_optimizer:
        yield "train.offload_optimizer needs train.zero_stage 1, 2 or 3"
