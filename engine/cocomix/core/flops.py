"""What a step costs in arithmetic: multiply-accumulates per token, by part of the model, and how many weights it has.

Forward figures; a backward pass costs twice as much where weights are trained. A block's weights are 12 d^2; causal
attention over S positions costs S*d a position (both products, half the square). From CoCoMix (arXiv 2502.08524).
What a flash attention computes again in its backward pass is not counted, nor are sums, norms and selections.
"""

import dataclasses

from cocomix.core.methods import doubles_sequence, mixes_concepts, predicts_concepts
from cocomix.core.shapes import StudentShape, TeacherShape

MULTIPLY_ADD = 2  # floating-point operations in a multiply-accumulate
TRAINED = 3  # forward and backward pass together, in forward passes


def forward_parts(shape: StudentShape) -> dict[str, float]:
    """Multiply-accumulates per token of a forward pass: "blocks" (products with weights), "attention", "concept head",
    "compress" and "LM head"."""
    d, length = shape.n_embd, shape.seq_len
    parts: dict[str, float] = {"blocks": shape.n_layer * 12 * d * d, "attention": shape.n_layer * length * d}
    if doubles_sequence(shape.mixing):
        h_blocks, f_blocks = shape.insert_layer, shape.n_layer - shape.insert_layer
        positions = shape.positions_per_token
        # The last block needs an output projection and an MLP for a position a token. Where every token has a concept,
        # the hidden positions need no query either.
        pairs = shape.concept_every == 1
        parts["blocks"] = (h_blocks + positions * f_blocks) * 12 * d * d - (positions - 1) * (9 + pairs) * d * d
        parts["attention"] = (h_blocks + positions**2 * f_blocks) * length * d - pairs * 2 * length * d
    if predicts_concepts(shape.mixing):
        parts["concept head"] = shape.concept_dim * d / shape.concept_every
    if mixes_concepts(shape.mixing):
        parts["compress"] = shape.concept_topk * d / shape.concept_every
    return parts | {"LM head": shape.vocab_size * d}


def student_forward(shape: StudentShape) -> int:
    """Multiply-accumulates per token of a forward pass, whatever the mixing."""
    return round(sum(forward_parts(shape).values()))


def ntp_forward(shape: StudentShape) -> int:
    """Multiply-accumulates per token of a plain next-token forward pass."""
    return student_forward(dataclasses.replace(shape, mixing="none"))


def cocomix_forward(shape: StudentShape) -> int:
    """Multiply-accumulates per token of a forward pass with interleaved concepts."""
    return student_forward(dataclasses.replace(shape, mixing="interleave"))


def labels_online(teacher: TeacherShape, seq_len: int) -> int:
    """Multiply-accumulates per token of taking labels from the teacher: its forward pass, its backward pass to the
    activations after block m, and the SAE's encoder. By activation, the forward pass to block m and the encoder."""
    d, blocks_after = teacher.n_embd, teacher.n_layer - 1 - teacher.layer
    if teacher.labels_by is None:
        return 0
    if teacher.labels_by == "activation":
        return (teacher.layer + 1) * (12 * d * d + seq_len * d) + teacher.n_latents * d
    forward = teacher.n_layer * (12 * d * d + seq_len * d) + teacher.vocab_size * d
    backward = blocks_after * (12 * d * d + 2 * seq_len * d) + teacher.vocab_size * d
    return forward + backward + teacher.n_latents * d


def soft_targets_online(teacher: TeacherShape, seq_len: int) -> int:
    """Multiply-accumulates per token of taking the teacher's next-token distribution: a forward pass."""
    d = teacher.n_embd
    return teacher.n_layer * (12 * d * d + seq_len * d) + teacher.vocab_size * d


def teacher_flops(teacher: TeacherShape, seq_len: int) -> int:
    """Floating-point operations per token of all that the teacher gives: labels, soft targets or both."""
    return MULTIPLY_ADD * _teachers_work(teacher, seq_len)


def sae_flops(teacher: TeacherShape, k: int, seq_len: int) -> int:
    """Floating-point operations per token of training an SAE that keeps k latents: the teacher's forward pass to block
    m, the encoder, and of the k latents the decoder and the gradients. What revives dead latents is not counted."""
    d = teacher.n_embd
    forward = (teacher.layer + 1) * (12 * d * d + seq_len * d) + teacher.n_latents * d
    return MULTIPLY_ADD * (forward + 4 * k * d)


def frozen_side(shape: StudentShape, teacher: TeacherShape | None) -> int:
    """Multiply-accumulates per token of what the student learns from the teacher online; None: nothing."""
    if teacher is None:
        return 0
    if not predicts_concepts(shape.mixing):
        teacher = dataclasses.replace(teacher, labels_by=None)
    return _teachers_work(teacher, shape.seq_len)


def _teachers_work(teacher: TeacherShape, seq_len: int) -> int:
    soft = soft_targets_online(teacher, seq_len) if teacher.soft_targets else 0
    return labels_online(teacher, seq_len) + soft


def training_flops(shape: StudentShape, teacher: TeacherShape | None = None) -> int:
    """Floating-point operations per token of a forward and backward pass; with a teacher, of its online work too."""
    return MULTIPLY_ADD * (TRAINED * student_forward(shape) + frozen_side(shape, teacher))


def block_parameters(width: int) -> int:
    """Weights of one block, biases and norms included."""
    return 12 * width * width + 13 * width


def gpt2_parameters(width: int, n_layer: int, vocab_size: int, context: int) -> int:
    """Weights of a GPT-2 with a tied head."""
    return (vocab_size + context) * width + n_layer * block_parameters(width) + 2 * width


def parameter_sizes(shape: StudentShape) -> list[int]:
    """Elements of each of the student's parameters; the tied head counts once."""
    d, concepts = shape.n_embd, shape.concept_dim
    block = [d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d]
    sizes = [shape.vocab_size * d, shape.seq_len * d, *block * shape.n_layer, d, d]
    if predicts_concepts(shape.mixing):
        sizes += [d, concepts * d, concepts]  # pre_bias, weight and bias of the predictor
    if mixes_concepts(shape.mixing):
        sizes += [concepts * d, d]  # weight and bias of the compress layer
    return [*sizes, d] if shape.mixing == "pause" else sizes


def parameter_count(shape: StudentShape) -> int:
    """Weights of the student."""
    return sum(parameter_sizes(shape))
