"""Memory of one GPU in a training step, by part, without making a model.

A step is walked through at the moments where memory peaks (on a CPU the label pass, the end of the forward pass, the
backward pass of each block and of the concept head, the last gradients, the optimizer); the fullest moment counts.
Figures are bytes of live tensors: what an allocator keeps idle and what the libraries take belong to the cluster's
reserve. On a GPU labels are made beside training, on a stream of their own that shares no memory with it.
P weights, n GPUs, R rows (positions of a micro batch), d width, C concepts, V vocabulary.

What DeepSpeed holds for a stage was read off its running optimizers: fp32 gradients as a whole at stage 1 in bf16, a
bucket of `reduce_bucket_size` elements and its copy while gradients are averaged, partitions otherwise.
"""

import math
from dataclasses import dataclass

from cocomix.core.flops import block_parameters, gpt2_parameters, parameter_sizes
from cocomix.core.methods import doubles_sequence, mixes_concepts, predicts_concepts
from cocomix.core.shapes import StudentShape, TeacherShape

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 500 * 2**20}  # of concept logits that exist at once
_LM_HEAD_BYTES = 384 * 2**20  # of vocabulary logits that exist at once on a GPU, in fp32
_TILE_ROWS = 128
_TEACHER_WINDOWS = {"cpu": 1, "cuda": 8}  # in one label pass
WIDE = 4  # bytes of a float32: masters, optimizer state, sums of gradients
_INDEX = 8


@dataclass(frozen=True)
class Setup:
    """One way to run a step: ZeRO stage, GPUs, windows in a micro batch and micro batches in a step."""

    stage: int
    gpus: int
    micro_batch: int
    rounds: int
    bf16: bool
    checkpointing: bool = False
    offload: bool = False  # optimizer state in host memory
    bucket: int = 500_000_000  # DeepSpeed's reduce_bucket_size, elements
    persistence_threshold: int = 100_000  # smaller parameters stay whole at stage 3
    kept_whole: int = 500_000_000  # elements that stay gathered between forward and backward pass at stage 3
    device: str = "cuda"
    soft_targets: str | None = None  # that a student is distilled with: "top" (the likeliest tokens) or "whole"
    soft_target_bytes: int = 0  # a token

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as the forward pass uses it."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Footprint:
    """Bytes of one GPU at the fullest moment, by part, and in host memory for each GPU."""

    parts: dict[str, int]
    moment: str
    host: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def footprint(
    shape: StudentShape, n_head: int, setup: Setup, teacher: TeacherShape | None = None, teacher_bytes: int = 2
) -> Footprint:
    """The fullest moment of a step. `teacher` is given where labels or soft targets are computed online,
    `teacher_bytes` is the size of its weights' type."""
    resident, host = _resident(shape, setup)
    ahead = 2 if setup.device == "cuda" else 1  # micro batches: the one that trains and the next
    resident["soft targets"] = ahead * setup.micro_batch * shape.seq_len * setup.soft_target_bytes
    if teacher is not None:
        resident["teacher and SAE"] = teacher_bytes * (
            gpt2_parameters(teacher.n_embd, teacher.n_layer, teacher.vocab_size, shape.seq_len)
            + 2 * teacher.n_latents * teacher.n_embd
        )
    moments = _moments(shape, n_head, setup)
    if teacher is not None:
        label_pass = _label_pass(shape, teacher, teacher_bytes, setup)
        if setup.device == "cuda":  # on a stream of its own, whose memory training cannot use
            resident["teacher and SAE"] += label_pass
        else:
            moments["labels"] = {"gradients": _gradients_between(shape, setup), "teacher and SAE": label_pass}
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    parts = dict(resident)
    for name, size in moments[fullest].items():
        parts[name] = parts.get(name, 0) + size
    return Footprint({name: int(size) for name, size in parts.items() if size}, fullest, int(host))


def _resident(shape, setup):
    """What lives through the whole step, and what of it is in host memory."""
    count, n, b = sum(parameter_sizes(shape)), setup.gpus, setup.weight_bytes
    share = 1 if setup.stage == 0 else n
    masters = 0 if setup.stage == 0 and not setup.bf16 else WIDE * count / share
    states = 2 * WIDE * count / share
    parts = {
        "weights": b * count / (n if setup.stage == 3 else 1),
        "masters": masters,
        "optimizer": states,
        "gradients": 0,
        "buffers": 0,
    }
    if setup.stage == 1 and setup.bf16 and not setup.offload:
        parts["gradients"] = WIDE * count
    elif setup.stage == 3:
        parts["gradients"] = WIDE * count / n
        parts["buffers"] = WIDE * setup.bucket
    if not setup.offload:
        return parts, 0
    gradients = WIDE * count / n  # the CPU's copy, in its master's precision
    return parts | {"masters": 0, "optimizer": 0}, masters + states + gradients


def _gradients_between(shape, setup):
    """Bytes of gradients that wait, beside the resident ones, while a later micro batch is computed."""
    if setup.rounds == 1 or setup.stage == 3:
        return 0
    count = sum(parameter_sizes(shape))
    if setup.stage == 2:
        return WIDE * count / setup.gpus
    whole = setup.weight_bytes * count
    return whole + (WIDE * setup.bucket if setup.stage == 1 and not setup.bf16 else 0)


def _gathered(shape, setup):
    """Bytes of whole weights that stage 3 holds beside the partitions, at the fullest."""
    if setup.stage != 3 or setup.gpus == 1:
        return 0
    count, d = sum(parameter_sizes(shape)), shape.n_embd
    concepts = shape.concept_dim * d if predicts_concepts(shape.mixing) else 0
    largest = max(shape.vocab_size * d, block_parameters(d), concepts)
    return setup.weight_bytes * min(count, setup.kept_whole + 2 * largest)


class _Activations:
    """Bytes that autograd keeps of a micro batch, by part of the model."""

    def __init__(self, shape: StudentShape, n_head: int, setup: Setup):
        d, b = shape.n_embd, setup.weight_bytes
        self.tokens = setup.micro_batch * shape.seq_len
        row = 16 * d * b + 4 * n_head + 16  # of a block: what its two norms, four products, GELU and attention keep
        self.blocks, self.inputs, self.rows = [], [], []
        for layer in range(shape.n_layer):
            doubled = doubles_sequence(shape.mixing) and layer >= shape.insert_layer
            positions = shape.positions_per_token if doubled else 1
            per_token = positions * row
            if doubled and layer == shape.n_layer - 1:  # two norms, keys and values of all positions, the rest of T
                per_token = self._last_block(shape, d * b, n_head)
            self.blocks.append(self.tokens * per_token)
            self.inputs.append(self.tokens * positions * d * b)
            self.rows.append(self.tokens * (1 if layer == shape.n_layer - 1 else positions))
        # Of tokens with a concept: centred hidden states in fp32; the normalised ones; kept values and indices. Mixing
        # needs the concepts before their scale, in fp32.
        predicted = WIDE * d + 2 * d * b + shape.concept_topk * (WIDE + 2 * _INDEX)
        self.concepts = (self.tokens / shape.concept_every) * (
            predicted * predicts_concepts(shape.mixing) + WIDE * d * mixes_concepts(shape.mixing)
        )
        self.head = self.tokens * 3 * d * b  # the final norm's input, the head's input and the head's gradient
        self.block_work = [5 * d * b * rows for rows in self.rows]  # gradients within an MLP's backward pass

    @staticmethod
    def _last_block(shape, width, n_head):
        """Bytes a token of the last block where it sees concept positions; `width` bytes of a row."""
        if shape.concept_every == 1:  # concept queries: 21 widths a token, of which 8 on 2T positions
            return 21 * width + 4 * n_head + 24
        of_all = shape.positions_per_token * (6 * width + 4 * n_head + 8)  # input, norm, QKV and attention's output
        return of_all + 12 * width + 8


def _moments(shape, n_head, setup):
    """What is live at each moment beside the resident parts."""
    act = _Activations(shape, n_head, setup)
    d, b, cpu = shape.n_embd, setup.weight_bytes, setup.device == "cpu"
    predicted, insert = predicts_concepts(shape.mixing), shape.insert_layer
    concepts = shape.concept_dim * d if predicted else 0
    vocabulary = shape.vocab_size * d
    wide = cpu or not setup.bf16 or setup.soft_targets is not None
    made = (WIDE if wide else b) * vocabulary  # the head's gradient, made in the forward pass
    held = 0 if _takes_own_loss(setup) else made  # of it, in the blocks' backward pass
    growth = {0: b, 1: b, 2: 0, 3: 0}[setup.stage] * (setup.rounds == 1)  # bytes of gradient a weight, while it grows
    bucket = b * setup.bucket if setup.stage == 2 else 0
    common = {"gathered": _gathered(shape, setup), "gradients": _gradients_between(shape, setup)}
    kept = act.inputs if setup.checkpointing else act.blocks

    def at(part, extra, blocks, concept_head, grown, lm_held=held):
        parts = dict(common)
        parts["gradients"] = parts["gradients"] + growth * grown
        parts["activations"] = sum(kept[:blocks]) + (act.concepts if concept_head else 0) + act.head
        parts["LM head"] = lm_held
        parts["concept head"] = WIDE * concepts if concept_head else 0
        parts["buffers"] = bucket if grown else 0
        return parts | {part: parts.get(part, 0) + extra}

    length = shape.n_layer
    moments = {"LM head": at("LM head", _lm_head_work(shape, setup, act.tokens, made), length, predicted, 0, lm_held=0)}
    grown = vocabulary
    for layer in reversed(range(length)):
        again = act.blocks[layer] - act.inputs[layer] if setup.checkpointing else 0
        moments[f"backward of block {layer}"] = at(
            "workspace", again + act.block_work[layer], layer + 1, predicted and layer >= insert, grown
        )
        grown += block_parameters(d)
        if predicted and layer == insert:
            grown += concepts * mixes_concepts(shape.mixing)  # the compress layer's
            moments["concept head's backward"] = at(
                "concept head", (WIDE + b * (b != WIDE)) * concepts, layer, True, grown
            )
            grown += concepts
    if predicted:
        moments["concept head"] = at(
            "concept head", _concept_chunk(shape, setup, act.tokens // shape.concept_every), insert, True, 0, lm_held=0
        )
    return moments | _last_moments(shape, setup, common, growth, held)


def _lm_head_work(shape, setup, tokens, product):
    """What the head's loss takes at most: a chunk of logits, which turn into their gradient, and the head's gradient
    (`product` bytes); with Liger's kernel on a GPU beside the chunk's share of it."""
    if _takes_own_loss(setup):
        return product + _own_loss_work(shape, setup, tokens)
    rows = _LM_HEAD_BYTES // (WIDE * shape.vocab_size)
    return min(rows, tokens) * shape.vocab_size * WIDE + 2 * product


def _takes_own_loss(setup):
    return setup.device == "cpu" or setup.soft_targets is not None


def _own_loss_work(shape, setup, tokens):
    """What our loss takes beside the head's gradient: in the forward pass a chunk of logits, three times for whole
    distributions, and their gradient in bf16; in the backward pass the head's gradient, scaled, as the weights have
    it."""
    cpu, weights = setup.device == "cpu", shape.vocab_size * shape.n_embd
    row = WIDE * shape.vocab_size
    most = (CHUNK_BYTES["cpu"] if cpu else _LM_HEAD_BYTES) // row
    if most < tokens:  # chunks are nearly equal, in tiles of a product
        most = most // _TILE_ROWS * _TILE_ROWS or most
        most = math.ceil(tokens / math.ceil(tokens / most) / _TILE_ROWS) * _TILE_ROWS
    chunk = min(most, tokens) * row
    whole = cpu and setup.soft_targets == "whole"
    buffers = chunk * (3 if whole else 1) + (chunk * setup.weight_bytes / WIDE if setup.bf16 else 0)
    if whole and setup.bf16:
        buffers += WIDE * weights  # a CPU multiplies the teacher's side in fp32
    scaled = setup.weight_bytes if cpu else WIDE + setup.weight_bytes * setup.bf16
    return max(buffers, scaled * weights)


def _concept_chunk(shape, setup, tokens):
    """A chunk of concept logits and, without a kernel of its own, the sort keys of the groups of columns."""
    per_logit = WIDE if not setup.bf16 else 2 if setup.device == "cuda" else 8
    chunk = min(CHUNK_BYTES[setup.device], tokens * shape.concept_dim * per_logit)
    if setup.device == "cuda":
        return chunk
    group = 1 << (math.isqrt(shape.concept_dim // shape.concept_topk).bit_length() - 1)
    return chunk + chunk // (per_logit * group) * 3 * _INDEX


def _last_moments(shape, setup, common, growth, held):
    """The embedding's gradient with the averaging of all gradients, and the optimizer's step."""
    count, b = sum(parameter_sizes(shape)), setup.weight_bytes
    buffer, copy = b * setup.bucket, WIDE * min(count, setup.bucket)
    if setup.stage == 2 and setup.bf16:
        copy += b * min(count, setup.bucket)  # flat in bf16, then in fp32
    buffered = setup.stage == 2 or (setup.stage == 1 and not setup.bf16)  # gradients move into the buffer and are cut
    partition = WIDE * count / setup.gpus if buffered else 0
    later = setup.rounds > 1
    if buffered:
        buffers = copy if later and setup.stage == 1 else buffer + copy  # there from the first micro batch at stage 1
    else:
        buffers = {0: copy if setup.gpus > 1 else 0, 1: 0, 3: 2 * copy}[setup.stage]
    end = dict(common)
    if setup.stage < 2:
        inside = min(count, setup.bucket) if buffered and not later else 0
        end["gradients"] += growth * (count - inside) + partition
    elif setup.stage == 2 and not later:
        end["gradients"] += partition
    end |= {"workspace": b * shape.vocab_size * shape.n_embd, "LM head": held, "buffers": buffers}
    whole = 0 if buffered or setup.stage == 3 else b * count
    step = {"gradients": whole + partition, "workspace": partition}
    return {"last gradients": end, "optimizer step": step}


def _label_pass(shape, teacher, size, setup):
    """Bytes of a pass through the teacher, in which attribution's backward pass needs the blocks' activations."""
    device = setup.device
    rows, d = _TEACHER_WINDOWS[device] * shape.seq_len, teacher.n_embd
    largest, activations = min(CHUNK_BYTES[device], rows * teacher.n_latents * size), 0
    if teacher.labels_by == "attribution":
        activations = rows * 16 * d * size * (teacher.n_layer - 1 - teacher.layer)
    picks_tokens = teacher.soft_targets and setup.soft_targets == "top"
    if teacher.labels_by == "attribution" or picks_tokens:  # the head is read
        head = size * teacher.vocab_size * d + 2 * _LM_HEAD_BYTES if device == "cuda" else WIDE * teacher.vocab_size * d
        largest = max(head, largest)
    return activations + largest + rows * 9 * d * size
