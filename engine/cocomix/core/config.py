"""Settings: dataclasses, YAML files over them, `key.sub=value` overrides, and their validation."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cocomix.core.errors import CocomixError
from cocomix.core.methods import LABELS, MIXING, SOFT_TARGETS, labels_name, predicts_concepts, soft_targets_name

LABELS_BY = ("attribution", "activation")
ATTENTION_BACKENDS = ("torch", "triton", "flash", "cudnn")


@dataclass
class DataConfig:
    """Text, tokenizer and token files."""

    folder: str = "data"  # train.bin, val.bin, meta.json and tokenizer/ live here
    # files, folders, "stdlib", "hf:NAME[:SPLIT[:SUBSET]]", or mappings {path: ..., weight: ..., text_key: ...}
    text: list[Any] = field(default_factory=list)
    text_key: str = "text"  # the field of JSONL records and dataset rows that holds the text
    tokenizer: str | None = None  # a folder or hub name; none: train a byte-level BPE on the text
    vocab_size: int = 4096  # of a tokenizer that is trained here
    max_tokens: int = 0  # stop after the document that reaches so many tokens; 0: take all text
    processes: int = 1  # that tokenize, which together use all cores; several are faster where there are many cores
    val_fraction: float = 0.05  # share of the text, in whole documents, that is held out for validation
    seq_len: int = 1024  # T: tokens in a window


@dataclass
class ModelConfig:
    """Shape of the student. The vocabulary comes from the token files, the context length from data.seq_len."""

    n_embd: int = 512
    n_layer: int = 8
    n_head: int = 8
    concept_dim: int = 32768
    concept_topk: int = 32
    insert_layer: int = 3
    concept_loss_weight: float = 0.1
    mixing: str = "interleave"  # or add, predict (without mixing), pause (a learned vector instead), none (NTP)


@dataclass
class TeacherConfig:
    """The frozen side: a causal language model, the block its SAE reads, and the SAE."""

    model: str | None = None  # a transformers folder or hub name
    sae: str | None = None  # an SAE file or folder; `cocomix sae` writes it
    sae_k: int | None = None  # keep at most so many latents a token; null: a TopK SAE's own k, 32 of any other SAE
    layer: int = 5  # m, 0-based
    label_topk: int = 4  # K
    labels_by: str = "attribution"  # or activation: label the largest latents, whatever they do for the next token
    dtype: str = "fp32"  # of the teacher's forward and backward pass


@dataclass
class SaeConfig:
    """Training of the TopK sparse autoencoder (`cocomix sae`)."""

    n_latents: int = 32768
    k: int = 32
    tokens: int = 10_000_000
    batch_tokens: int = 4096
    lr: float = 1e-3
    warmup_steps: int = 100
    aux_k: int = 256  # dead latents that help to explain the residual
    aux_weight: float = 1 / 32
    dead_after_tokens: int = 1_000_000  # a latent silent for so long is dead
    seed: int = 0


@dataclass
class LabelsConfig:
    """Where concept labels come from: a cache, or the teacher itself while training."""

    cache: str | None = None  # a folder; `cocomix labels` writes it. None: online
    shard_windows: int = 4096  # windows in one file of the cache


@dataclass
class DistillationConfig:
    """Knowledge distillation: KL(teacher || student) of next-token distributions beside the student's own loss."""

    weight: float = 0.0  # of that term; 0: no distillation
    top_k: int | None = 32  # of the teacher's likeliest tokens, the rest counting as one; null: all, online alone
    cache: str | None = None  # a folder; `cocomix labels` writes it. None: online


@dataclass
class TrainConfig:
    """Optimisation, schedule and bookkeeping of `cocomix train`."""

    run: str = "runs/run"  # metrics, checkpoints and the finished model
    tokens: int = 1_000_000_000  # training tokens; steps = ceil(tokens / (global_batch * seq_len))
    global_batch: int = 512  # windows in one optimizer step, over all ranks
    micro_batch: int = 8  # windows in one forward pass of one rank
    lr: float = 6e-4
    min_lr_ratio: float = 0.1  # the cosine ends at this share of lr
    warmup_steps: int = 130
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    precision: str = "fp32"  # fp32 | bf16 (fp32 master weights)
    zero_stage: int = 1  # DeepSpeed splits over the ranks: 1 optimizer state, 2 gradients too, 3 weights too; 0 nothing
    offload_optimizer: bool = False  # optimizer state and step on the CPU
    activation_checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again when needed
    compile: bool = False  # torch.compile each block
    attention_backend: str | None = None  # over the doubled sequence: torch | triton | flash | cudnn; null: by rule
    seed: int = 0  # of initialisation and data order
    log_every: int = 10
    eval_every: int = 500
    eval_windows: int = 0  # validation windows an evaluation reads; 0: all
    save_every: int = 500
    keep_checkpoints: int = 2
    continue_after_failed_save: bool = False  # a full disk: go on without that checkpoint instead of stopping
    max_skipped_steps: int = 10  # steps in a row whose loss or gradient is not finite: so many end the run
    spike_deviations: float = 6.0  # a loss so many standard deviations above its running mean is logged; 0: none
    tensorboard: bool = True
    wandb_project: str | None = None  # log to Weights & Biases as well
    timeout_minutes: float = 10.0  # a collective that waits longer ends the run


@dataclass
class Config:
    """Everything a command may need; each command reads the sections it uses."""

    out: str = "runs"  # a folder that the file's own paths can start with: run: ${out}/ntp
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # goes to DeepSpeed as it is

    @property
    def learns_from(self) -> tuple[str, ...]:
        """What the student needs beside its tokens, of `methods.LABELS` and `methods.SOFT_TARGETS`."""
        wanted = {LABELS: predicts_concepts(self.model.mixing), SOFT_TARGETS: self.distillation.weight > 0}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def cache_of(self, name: str) -> str | None:
        """The folder that `LABELS` or `SOFT_TARGETS` are read from; None: the teacher makes them while training."""
        return {LABELS: self.labels.cache, SOFT_TARGETS: self.distillation.cache}[name]

    def title_of(self, name: str) -> str:
        """What the config's `LABELS` or `SOFT_TARGETS` are called."""
        return {LABELS: labels_name(self.teacher.labels_by), SOFT_TARGETS: soft_targets_name(self.distillation.top_k)}[
            name
        ]

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step, over all ranks."""
        return self.train.global_batch * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.train.tokens / self.tokens_per_step)


def load_config(path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides and validate.

    A file may name another one under `base:` (relative to itself), whose settings it then changes. Raises
    `CocomixError` for a missing file, an unknown key (with the nearest known one), a value of the wrong type and
    values that contradict each other.
    """
    sources = [_read_with_base(Path(path), seen=[]), *(_read_override(text) for text in overrides)]
    merged = OmegaConf.structured(Config)
    for source, where in sources:
        try:
            merged = OmegaConf.merge(merged, source)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None)
            reason = str(error).splitlines()[0]
            raise CocomixError(f"{where}: {key or 'config'}: {reason}") from None
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise CocomixError(f"{path}: {str(error).splitlines()[0]}") from None
    _validate(config, str(path))
    return config


def _read_with_base(path: Path, seen: list[Path]):
    if path.resolve() in seen:
        raise CocomixError(f"{path}: its `base:` leads back to itself")
    try:
        content = OmegaConf.load(path)
    except (FileNotFoundError, IsADirectoryError):
        raise CocomixError(f"no config file at {path}") from None
    except Exception as error:  # YAML's own errors have no common base that OmegaConf promises
        raise CocomixError(f"{path} is not valid YAML: {error}") from None
    if not OmegaConf.is_dict(content):
        raise CocomixError(f"{path} holds no settings: expected sections such as `model:` and `train:`")
    base = content.pop("base", None)
    _check_keys(content, Config, str(path))
    if base is not None:
        if not isinstance(base, str):
            raise CocomixError(f"{path}: `base:` must name a file, not {base}")
        parent, _ = _read_with_base(path.parent / base, [*seen, path.resolve()])
        content = OmegaConf.merge(parent, content)
    return content, str(path)


def _read_override(text: str):
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise CocomixError(f"override {text!r}: expected key.sub=value, for example train.lr=3e-4")
    try:
        source = OmegaConf.from_dotlist([text])
    except Exception as error:
        raise CocomixError(f"override {text!r}: {error}") from None
    _check_keys(source, Config, f"override {text!r}")
    return source, f"override {text!r}"


def _check_keys(node, schema, where: str, prefix: str = "") -> None:
    """Raise `CocomixError` for unknown keys, and for a section, list or mapping where something else is expected."""
    known = {f.name: f for f in dataclasses.fields(schema)}
    for key in node:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise CocomixError(f"{where}: unknown key {prefix}{key}; {hint}")
        section, value = known[key].default_factory, OmegaConf.to_container(node)[key]
        if dataclasses.is_dataclass(section):
            if not isinstance(value, dict):
                raise CocomixError(f"{where}: {prefix}{key} is a section, not a value; write {prefix}{key}.KEY")
            _check_keys(node[key], section, where, f"{prefix}{key}.")
        elif section in (list, dict) and isinstance(value, (list, dict)) and not isinstance(value, section):
            raise CocomixError(f"{where}: {prefix}{key}: expected a {'list' if section is list else 'mapping'}")


_POSITIVE = (
    "data.vocab_size",
    "data.processes",
    "model.n_embd",
    "model.n_layer",
    "model.n_head",
    "model.concept_dim",
    "model.concept_topk",
    "teacher.label_topk",
    "sae.n_latents",
    "sae.k",
    "sae.tokens",
    "sae.batch_tokens",
    "sae.lr",
    "sae.dead_after_tokens",
    "labels.shard_windows",
    "train.tokens",
    "train.global_batch",
    "train.micro_batch",
    "train.lr",
    "train.eps",
    "train.grad_clip",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.max_skipped_steps",
    "train.timeout_minutes",
)
_NOT_NEGATIVE = (
    "data.max_tokens",
    "model.concept_loss_weight",
    "teacher.layer",
    "distillation.weight",
    "sae.warmup_steps",
    "sae.aux_k",
    "sae.aux_weight",
    "train.warmup_steps",
    "train.weight_decay",
    "train.eval_windows",
    "train.spike_deviations",
)


def _validate(config: Config, where: str) -> None:
    _check_signs(config, where)
    data, model, teacher, sae, train = config.data, config.model, config.teacher, config.sae, config.train
    distillation = config.distillation
    checks = [
        (data.seq_len >= 2, "data.seq_len must be at least 2: a window needs a next token to predict"),
        (0 < data.val_fraction < 1, "data.val_fraction must lie between 0 and 1"),
        (data.vocab_size <= 65536, "data.vocab_size must be at most 65536: token files hold uint16"),
        (model.mixing in MIXING, f"model.mixing is {model.mixing!r}; it must be one of {', '.join(MIXING)}"),
        (
            model.n_embd % model.n_head == 0,
            f"model.n_embd ({model.n_embd}) must be a multiple of model.n_head ({model.n_head})",
        ),
        (distillation.top_k is None or distillation.top_k > 0, "distillation.top_k must be positive, or null for all"),
        (
            distillation.cache is None or distillation.weight > 0,
            "distillation.cache is set but distillation.weight is 0: set the weight, or leave the cache out",
        ),
        (
            distillation.cache is None or distillation.cache != config.labels.cache,
            f"labels.cache and distillation.cache are the same folder ({distillation.cache}): name two",
        ),
        (
            distillation.top_k is not None or distillation.cache is None,
            "distillation.cache needs distillation.top_k: the whole distribution of every token would fill any disk",
        ),
        (train.precision in ("fp32", "bf16"), f"train.precision is {train.precision!r}; it must be fp32 or bf16"),
        (
            teacher.labels_by in LABELS_BY,
            f"teacher.labels_by is {teacher.labels_by!r}; it must be {' or '.join(LABELS_BY)}",
        ),
        (teacher.dtype in ("fp32", "bf16"), f"teacher.dtype is {teacher.dtype!r}; it must be fp32 or bf16"),
        (train.zero_stage in (0, 1, 2, 3), f"train.zero_stage is {train.zero_stage}; it must be 0, 1, 2 or 3"),
        (
            not (train.precision == "bf16" and train.zero_stage == 0),
            "train.precision=bf16 needs train.zero_stage 1, 2 or 3: at stage 0 DeepSpeed takes a spurious optimizer "
            "step while it initialises",
        ),
        (
            not (train.offload_optimizer and train.zero_stage == 0),
            "train.offload_optimizer needs train.zero_stage 1, 2 or 3",
        ),
        (
            train.attention_backend in (None, *ATTENTION_BACKENDS),
            f"train.attention_backend is {train.attention_backend!r}; it must be null or one of "
            f"{', '.join(ATTENTION_BACKENDS)}",
        ),
        (
            train.global_batch % train.micro_batch == 0,
            f"train.global_batch ({train.global_batch}) must be a multiple of train.micro_batch ({train.micro_batch})",
        ),
        (0 <= train.min_lr_ratio <= 1, "train.min_lr_ratio must lie between 0 and 1"),
        (0 <= train.beta1 < 1, "train.beta1 must be at least 0 and below 1"),
        (0 <= train.beta2 < 1, "train.beta2 must be at least 0 and below 1"),
        (sae.k <= sae.n_latents, f"sae.k ({sae.k}) must be at most sae.n_latents ({sae.n_latents})"),
    ]
    if model.mixing != "none":
        checks.append(
            (
                0 <= model.insert_layer < model.n_layer,
                f"model.insert_layer ({model.insert_layer}) must be at least 0 and below model.n_layer "
                f"({model.n_layer})",
            )
        )
    if predicts_concepts(model.mixing):
        checks += [
            (
                model.concept_topk <= model.concept_dim,
                f"model.concept_topk ({model.concept_topk}) must be at most model.concept_dim ({model.concept_dim})",
            ),
            (model.concept_dim <= 65535, "model.concept_dim must be at most 65535: label caches hold uint16"),
        ]
    for holds, message in checks:
        if not holds:
            raise CocomixError(f"{where}: {message}")


def _check_signs(config: Config, where: str) -> None:
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if not math.isfinite(value):
            raise CocomixError(f"{where}: {name} must be a finite number")
        if value < 0 or (value == 0 and name in _POSITIVE):
            raise CocomixError(f"{where}: {name} must {'be positive' if name in _POSITIVE else 'not be negative'}")
