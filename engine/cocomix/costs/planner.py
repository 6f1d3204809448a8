"""`cocomix plan`: what a config needs on a cluster, and how fast it would be. Arithmetic only: no model is made.

A prediction, with these assumptions. Products run at the cluster's rates, which are what large library products reach;
everything else moves bytes at the memory's speed, one kernel after the other; a backward pass takes twice the time of
its forward pass; a host that starts kernels too slowly sets the pace. Collectives run at the slower of a GPU's links
within the node and the networks of all its GPUs together, as NCCL's rings use them. Only what DeepSpeed overlaps with
the backward pass is hidden, and of that a stated share.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.flops import (
    MULTIPLY_ADD,
    TRAINED,
    forward_parts,
    frozen_side,
    parameter_count,
    parameter_sizes,
    training_flops,
)
from cocomix.core.methods import SOFT_TARGETS, doubles_sequence, mixes_concepts, predicts_concepts
from cocomix.core.model_names import without_prefix
from cocomix.core.precision import settled
from cocomix.core.shapes import StudentShape, TeacherShape, student_shape
from cocomix.costs.cluster import Cluster
from cocomix.costs.footprint import WIDE, Footprint, Setup, footprint
from cocomix.teacher.supervision import joint_shape, learns_from, wanted_kinds

# Shapes by name, so that a plan needs no download: width, blocks, vocabulary.
GPT2_SIZES = {"gpt2": (768, 12), "gpt2-medium": (1024, 24), "gpt2-large": (1280, 36), "gpt2-xl": (1600, 48)}
GPT2_VOCABULARY = 50257
_SECONDS_A_DAY = 86400
_MAX_GPUS = 2**16
_MOST = 2**31  # of widths, blocks and token ids
_TIE = 1.03  # times closer than this count as equal: no prediction is better


@dataclass(frozen=True)
class Communication:
    """What one GPU puts into collectives in a step, as DeepSpeed's comms logger counts: bytes of the message, which is
    the whole tensor for all-reduce and reduce-scatter and one GPU's part for all-gather. Scalars are left out."""

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0
    messages: int = 0

    def wire_bytes(self, gpus: int) -> float:
        """Bytes that each GPU sends, by ring algorithms."""
        share = (gpus - 1) / gpus
        return share * (2 * self.all_reduce + self.reduce_scatter + gpus * self.all_gather)


@dataclass(frozen=True)
class Prediction:
    """One setup: what it needs and how long a step takes."""

    setup: Setup
    memory: Footprint
    fits: bool
    offered: bool  # whether `cocomix train` takes this stage in this precision
    flops: float  # of a step, one GPU
    bytes: float
    communication: Communication
    compute_s: float
    communication_s: float
    exposed_s: float  # of the communication, what no computation hides
    step_s: float
    tokens_per_s: float
    days: float


@dataclass(frozen=True)
class Job:
    """What is planned: the shapes, the cluster, and the config they came from."""

    config: Config
    shape: StudentShape
    teacher: TeacherShape | None  # None where labels and soft targets come from caches or are not needed
    cluster: Cluster

    @property
    def rate(self) -> float:
        """Floating-point operations a second in the student's products."""
        bf16 = self.config.train.precision == "bf16"
        return (self.cluster.product_tflops if bf16 else self.cluster.fp32_tflops) * 1e12


def make_job(config: Config, cluster: Cluster, vocab_size: int | None = None) -> Job:
    """Collect the shapes; a precision of `auto` is a GPU's. Raises `CocomixError` where the vocabulary or the teacher's
    shape cannot be known."""
    config, _ = settled(config, "cuda")
    shape = student_shape(config, vocab_size or known_vocabulary(config))
    return Job(config, shape, _teacher(config, shape.vocab_size), cluster)


def known_vocabulary(config: Config) -> int:
    """The vocabulary of the token files, or of the tokenizer that will make them. Raises `CocomixError` where nothing
    tells it."""
    meta = Path(config.data.folder) / "meta.json"
    if meta.is_file():
        return _read_shape(meta, "vocab_size")["vocab_size"]
    name = config.data.tokenizer
    if name is None:
        return config.data.vocab_size
    if _gpt2_size(name):
        return GPT2_VOCABULARY
    raise CocomixError(
        f"the vocabulary's size is not known before `cocomix data` has run: pass --vocab-size (that of {name})"
    )


def _teacher(config, vocab_size):
    """The shape of what runs beside training, None where all comes from caches or nothing is needed."""
    online = [kind for kind in wanted_kinds(config) if not kind.cache_folder(config)]
    if not online:
        return None
    if config.teacher.self_taught_after:  # by the student of the run's first part
        language_model = (config.model.n_embd, config.model.n_layer, vocab_size)
        return joint_shape([kind.teacher_shape(config, *language_model) for kind in online])
    cache = online[0].how_to_cache(config)
    if config.teacher.model is None:
        raise CocomixError(f"{online[0].name} need a teacher: set teacher.model{cache}")
    language_model = _language_model_shape(config.teacher.model, cache)
    return joint_shape([kind.teacher_shape(config, *language_model) for kind in online])


def _language_model_shape(name, cache):
    """Width, blocks and vocabulary; `cache` says what to do where they cannot be known."""
    known = _gpt2_size(name)
    if known is not None:
        return *known, GPT2_VOCABULARY
    file = Path(name) / "config.json"
    if not file.is_file():
        raise CocomixError(f"teacher.model={name} is not a local folder, so its shape is unknown: download it{cache}")
    stored = _read_shape(file, "vocab_size")
    width, n_layer = (
        stored.get(a, stored.get(b)) for a, b in (("n_embd", "hidden_size"), ("n_layer", "num_hidden_layers"))
    )
    if width is None or n_layer is None:
        raise CocomixError(f"{file} names neither n_embd and n_layer nor hidden_size and num_hidden_layers")
    return width, n_layer, stored["vocab_size"]


def _gpt2_size(name):
    """Width and blocks of a GPT-2 by its name on the hub; None for any other name."""
    return GPT2_SIZES.get(without_prefix(name).removeprefix("openai-community/"))


def _read_shape(file, *keys):
    content = read_json(file, "the description")
    missing = [key for key in keys if type(content.get(key)) is not int or not 0 < content[key] < _MOST]
    if missing:
        raise CocomixError(f"{file} holds no possible {missing[0]}")
    return content


# ---------------------------------------------------------------------------------------------- one setup


def communication(shape: StudentShape, setup: Setup) -> Communication:
    """The collectives of a step, as DeepSpeed runs them at its settings for `train.precision`.

    Stages 0 and 1 average gradients once a step, stages 2 and 3 after every micro batch; all in fp32, up to stage 2 by
    all-reduce, after which each GPU keeps its part. Stage 3 gathers weights for the forward and again for the backward
    pass, but for those that stay (`kept_whole`); the tied table has two uses and so twice as many gathers.
    """
    sizes, n, b = parameter_sizes(shape), setup.gpus, setup.weight_bytes
    if n == 1:
        return Communication()
    count = sum(sizes)
    buckets = math.ceil(count / setup.bucket)
    reductions = 1 if setup.stage < 2 else setup.rounds
    if setup.stage == 0:
        return Communication(all_reduce=WIDE * count, messages=buckets)
    if setup.stage < 3:
        padded = _round_up(count, 2 * n)  # DeepSpeed aligns the flat weights to two elements for each GPU
        whole = padded if setup.stage == 1 and setup.bf16 and not setup.offload else count
        return Communication(
            all_reduce=WIDE * whole * reductions, all_gather=b * padded // n, messages=buckets * reductions + 1
        )
    parts = [_round_up(size, n) // n for size in sizes]
    stays = [size <= setup.persistence_threshold for size in sizes]
    gathered = sum(part for part, whole in zip(parts, stays, strict=True) if not whole)
    twice = 1 - min(1.0, setup.kept_whole / count)  # share of the weights that is gathered again
    table = 0 if stays[0] else 2 * parts[0]
    in_a_round = gathered + round(twice * (gathered + table))
    once = sum(part for part, whole in zip(parts, stays, strict=True) if whole)
    return Communication(
        reduce_scatter=WIDE * n * sum(parts) * setup.rounds,
        all_gather=b * (in_a_round * setup.rounds + once),
        messages=setup.rounds * (buckets + 2 * shape.n_layer) + 1,
    )


def _round_up(value, multiple):
    return -(-value // multiple) * multiple


def communication_time(volume: Communication, gpus: int, cluster: Cluster) -> float:
    """Seconds of a step's collectives, one after the other."""
    if gpus == 1:
        return 0.0
    in_node = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    rate, steps_s = cluster.within_gb_s, 2 * (in_node - 1) * cluster.within_latency_us
    if nodes > 1:
        rate = min(rate, cluster.between_gb_s * in_node)
        steps_s += 2 * math.ceil(math.log2(nodes)) * cluster.between_latency_us
    return volume.wire_bytes(gpus) / (rate * 1e9 * cluster.link_share) + volume.messages * steps_s * 1e-6


def step_flops(job: Job, setup: Setup) -> float:
    """Floating-point operations of one GPU in a step, those that checkpointing repeats included."""
    tokens = setup.micro_batch * setup.rounds * job.shape.seq_len
    parts = forward_parts(job.shape)
    again = MULTIPLY_ADD * (parts["blocks"] + parts["attention"]) if setup.checkpointing else 0
    return tokens * (training_flops(job.shape, job.teacher) + again)


def step_bytes(job: Job, setup: Setup) -> float:
    """Bytes that one GPU moves in a step outside of products and attention: what norms, sums, GELU, selections, mixing,
    gradients' sums and AdamW read and write."""
    shape, b = job.shape, setup.weight_bytes
    d, tokens = shape.n_embd, setup.micro_batch * setup.rounds * shape.seq_len
    positions = shape.n_layer
    if doubles_sequence(shape.mixing):
        more = shape.positions_per_token - 1
        positions = shape.n_layer + more * (shape.n_layer - shape.insert_layer - 1)
    blocks = positions * 18 * d * b  # norms read and write, residuals read two and write one, GELU 4d in and out
    heads = shape.vocab_size * 4 * b  # a logit is written, read for its row's sum, read and written as a gradient
    if predicts_concepts(shape.mixing):
        # a read more for the TopK; the normalised hidden states
        heads += (shape.concept_dim * 5 * b + 8 * d * b) / shape.concept_every
    if mixes_concepts(shape.mixing):
        heads += (shape.concept_topk * d * 4 * b + 16 * d * b) / shape.concept_every
    labels = 0
    if job.teacher is not None:
        teacher = job.teacher
        logits = 4 * teacher.vocab_size * ((teacher.labels_by == "attribution") + teacher.soft_targets)
        labels = 2 * (_teacher_blocks(teacher) * 18 * teacher.n_embd + logits + 2 * teacher.n_latents)
    activations = tokens * (blocks * (TRAINED + setup.checkpointing) + heads + labels)
    count = parameter_count(shape)
    share = 1 if setup.stage == 0 else setup.gpus
    adam = count / share * (6 * WIDE + WIDE + b)  # master and both moments read and written, the gradient read
    return activations + adam + count * (setup.rounds * (b + 2 * WIDE) + 2 * WIDE)


def _teacher_blocks(teacher):
    """Passes through a block of the teacher, forward or backward, that its online work takes."""
    of_labels = {"attribution": 2 * teacher.n_layer - teacher.layer - 1, "activation": teacher.layer + 1, None: 0}
    return of_labels[teacher.labels_by] + teacher.n_layer * teacher.soft_targets


def _host_time(job, setup):
    """Seconds that the host needs to start a step's kernels: about 14 a block and 40 around the heads in a forward
    pass, and at stage 3 DeepSpeed's hooks around every module."""
    cluster, n_layer = job.cluster, job.shape.n_layer
    kernels = (14 * n_layer + 40) * (TRAINED + setup.checkpointing)
    if job.teacher is not None:
        kernels += 14 * _teacher_blocks(job.teacher)
    hooks = 9 * (n_layer + 1) * cluster.hook_us if setup.stage == 3 else 0.0
    return setup.rounds * (kernels * cluster.launch_us + hooks) * 1e-6


def predict(job: Job, setup: Setup) -> Prediction:
    """Memory, arithmetic, communication and time of one setup."""
    config, cluster, train = job.config, job.cluster, job.config.train
    teacher_bytes = _teacher_bytes(config)
    memory = footprint(job.shape, config.model.n_head, setup, job.teacher, teacher_bytes)
    flops, moved = step_flops(job, setup), step_bytes(job, setup)
    tokens = setup.micro_batch * setup.rounds * job.shape.seq_len
    passes = TRAINED + setup.checkpointing
    attention = tokens * MULTIPLY_ADD * passes * forward_parts(job.shape)["attention"]
    labels = tokens * MULTIPLY_ADD * frozen_side(job.shape, job.teacher)
    label_rate = (cluster.product_tflops if teacher_bytes == 2 else cluster.fp32_tflops) * 1e12
    compute = (
        (flops - attention - labels) / job.rate
        + labels / label_rate
        + attention / min(job.rate, cluster.attention_tflops * 1e12)
        + moved / (cluster.memory_tb_s * 1e12)
    )
    compute = max(compute, _host_time(job, setup))
    volume = communication(job.shape, setup)
    communicating = communication_time(volume, setup.gpus, cluster)
    hidden = min(cluster.overlap * communicating, 2 / 3 * compute) if _overlaps(config, setup) else 0.0
    step = compute + communicating - hidden
    per_second = tokens * setup.gpus / step
    return Prediction(
        setup=setup,
        memory=memory,
        fits=memory.total <= (cluster.memory_gb - cluster.reserved_gb) * 1e9,
        offered=setup.stage > 0 or not (setup.bf16 or setup.offload),
        flops=flops,
        bytes=moved,
        communication=volume,
        compute_s=compute,
        communication_s=communicating,
        exposed_s=communicating - hidden,
        step_s=step,
        tokens_per_s=per_second,
        days=train.tokens / per_second / _SECONDS_A_DAY,
    )


def _zero_section(config):
    section = config.deepspeed.get("zero_optimization", {})
    return section if isinstance(section, dict) else {}


def _overlaps(config, setup):
    """Whether DeepSpeed averages gradients while the backward pass runs; by default at stage 3 alone."""
    return bool(_zero_section(config).get("overlap_comm", setup.stage == 3))


def _setup(job, stage, gpus, micro_batch, global_batch, **more):
    zero, train = _zero_section(job.config), job.config.train
    reuse = int(zero.get("stage3_max_reuse_distance", 10**9))
    prefetch = int(zero.get("stage3_prefetch_bucket_size", 5 * 10**7))
    settings = {
        "checkpointing": train.activation_checkpointing,
        "offload": train.offload_optimizer and stage > 0,
        **_soft_targets(job),
    }
    return Setup(
        stage=stage,
        gpus=gpus,
        micro_batch=micro_batch,
        rounds=global_batch // (gpus * micro_batch),
        bf16=train.precision == "bf16",
        bucket=int(zero.get("reduce_bucket_size", 5 * 10**8)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 10**5)),
        kept_whole=max(reuse // 2, prefetch),
        **{**settings, **more},
    )


def _soft_targets(job):
    """The settings of a `Setup` that distillation decides."""
    if SOFT_TARGETS not in learns_from(job.config):
        return {}
    top_k = job.config.distillation.top_k
    if top_k is not None:
        return {"soft_targets": "top", "soft_target_bytes": 10 * top_k}  # ids int64 and float16
    return {"soft_targets": "whole", "soft_target_bytes": job.teacher.n_embd * _teacher_bytes(job.config)}


def _teacher_bytes(config):
    return 2 if config.teacher.dtype == "bf16" else 4


# ---------------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class Plan:
    """The stages as configured, and the choice among all stages, micro batches and checkpointing on or off."""

    job: Job
    gpus: int
    global_batch: int
    stages: list[Prediction]
    chosen: Prediction | None
    advice: str = ""


def configured(job: Job, gpus: int) -> Prediction:
    """The config's own setup on `gpus` GPUs. Raises `CocomixError` where its batches do not divide."""
    train = job.config.train
    if train.global_batch % (gpus * train.micro_batch):
        raise CocomixError(_batch_message(train, gpus))
    return predict(job, _setup(job, train.zero_stage, gpus, train.micro_batch, train.global_batch))


def make_plan(job: Job, gpus: int, raise_batch: bool = False) -> Plan:
    """Predict every stage on `gpus` GPUs and choose.

    With `raise_batch` a global batch that does not divide among the GPUs is raised until it does, and the micro batch
    follows from the choice; otherwise both raise `CocomixError`, as training would.
    """
    train = job.config.train
    if gpus < 1:
        raise CocomixError(f"--gpus must be at least 1, not {gpus}")
    global_batch = _round_up(train.global_batch, gpus) if raise_batch else train.global_batch
    micro_batch = train.micro_batch
    if global_batch % (gpus * micro_batch):
        if not raise_batch:
            raise CocomixError(_batch_message(train, gpus))
        micro_batch = max(size for size in divisors(global_batch // gpus) if size <= micro_batch)
    stages = [predict(job, _setup(job, stage, gpus, micro_batch, global_batch)) for stage in range(4)]
    chosen = choose(job, gpus, global_batch)
    advice = "" if chosen is not None else what_would_fit(job, gpus, global_batch)
    return Plan(job, gpus, global_batch, stages, chosen, advice)


def choose(job: Job, gpus: int, global_batch: int, offload: bool | None = None) -> Prediction | None:
    """The fastest setup that fits, None where none does. Among those as fast as it, nearly: without
    checkpointing, then the smallest stage, then the largest micro batch."""
    more = {} if offload is None else {"offload": offload}
    candidates = [
        predict(job, _setup(job, stage, gpus, size, global_batch, checkpointing=again, **more))
        for stage in range(4)
        for again in (False, True)
        for size in divisors(global_batch // gpus)
    ]
    candidates = [found for found in candidates if found.fits and found.offered]
    if not candidates:
        return None
    fastest = min(found.step_s for found in candidates)
    return min(
        (found for found in candidates if found.step_s <= _TIE * fastest),
        key=lambda found: (found.setup.checkpointing, found.setup.stage, -found.setup.micro_batch),
    )


def divisors(number: int) -> list[int]:
    """Whole numbers that divide `number`, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _batch_message(train, gpus):
    message = (
        f"train.global_batch ({train.global_batch}) must be a multiple of train.micro_batch "
        f"({train.micro_batch}) x {gpus} GPUs"
    )
    if train.global_batch % gpus == 0:
        fitting = ", ".join(map(str, divisors(train.global_batch // gpus)))
        return f"{message}: train.micro_batch could be {fitting}"
    return f"{message}: the next batch that divides is {_round_up(train.global_batch, gpus)}"


def what_would_fit(job: Job, gpus: int, global_batch: int) -> str:
    """Where no setup fits, in words: the optimizer in host memory, or more GPUs; with the least that is needed here."""
    options = []
    offloaded = choose(job, gpus, global_batch, offload=True)
    if offloaded is not None:
        options.append(
            f"train.offload_optimizer=true with {settings_of(offloaded)} ({gigabytes(offloaded.memory.total)} GB a GPU "
            f"and {gigabytes(offloaded.memory.host)} GB of host memory for each)"
        )
    more = gpus
    while (more := 2 * more) <= _MAX_GPUS:
        if global_batch % more == 0 and (found := choose(job, more, global_batch)) is not None:
            options.append(f"{more} GPUs with {settings_of(found)} ({gigabytes(found.memory.total)} GB a GPU)")
            break
    least = min(
        (predict(job, _setup(job, stage, gpus, 1, global_batch, checkpointing=True)) for stage in range(1, 4)),
        key=lambda found: found.memory.total,
    )
    needed = (
        f"nothing fits into {job.cluster.memory_gb:g} GB less {job.cluster.reserved_gb:g} GB reserved: the least "
        f"is {gigabytes(least.memory.total)} GB with {settings_of(least)}"
    )
    return f"{needed}; what would fit: {' or '.join(options) or 'a smaller model, context or concept_dim'}"


def settings_of(found: Prediction) -> str:
    """A setup as the settings that make it."""
    setup = found.setup
    return (
        f"train.zero_stage={setup.stage} train.micro_batch={setup.micro_batch} "
        f"train.activation_checkpointing={str(setup.checkpointing).lower()}"
    )


def gigabytes(size: float) -> str:
    """Bytes in GB (1e9), with one decimal."""
    return f"{size / 1e9:.1f}"
