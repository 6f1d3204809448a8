"""What a step costs in arithmetic: multiply-accumulates per token, by part of the model.

Forward figures; a backward pass costs twice as much where weights are trained. A block's weights are 12 d^2; causal
attention over S positions costs S*d a position (both products, half the square). From CoCoMix (arXiv 2502.08524).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StudentShape:
    """Width d, blocks L, first doubled block l, vocabulary V, context T in tokens, concepts C and k of them kept."""

    n_embd: int
    n_layer: int
    insert_layer: int
    vocab_size: int
    seq_len: int
    concept_dim: int
    concept_topk: int


@dataclass(frozen=True)
class TeacherShape:
    """Width, blocks and vocabulary of the teacher, the block m that its SAE reads, and the SAE's latents."""

    n_embd: int
    n_layer: int
    layer: int
    vocab_size: int
    n_latents: int


def ntp_forward(shape: StudentShape) -> int:
    """Multiply-accumulates per token of a plain next-token forward pass."""
    d, length = shape.n_embd, shape.seq_len
    return shape.n_layer * (12 * d * d + length * d) + shape.vocab_size * d


def cocomix_forward(shape: StudentShape) -> int:
    """Multiply-accumulates per token of a forward pass with interleaved concepts."""
    d, length, h_blocks = shape.n_embd, shape.seq_len, shape.insert_layer
    f_blocks = shape.n_layer - h_blocks
    h_cost = h_blocks * (12 * d * d + length * d)
    f_cost = 2 * f_blocks * (12 * d * d + 2 * length * d)
    hidden_positions_of_last_block = 10 * d * d + 2 * length * d  # no query, no output projection, no MLP
    concepts = shape.concept_dim * d + shape.concept_topk * d
    return h_cost + f_cost - hidden_positions_of_last_block + concepts + shape.vocab_size * d


def labels_online(teacher: TeacherShape, seq_len: int) -> int:
    """Multiply-accumulates per token of taking labels from the teacher: its forward pass, its backward pass to the
    activations after block m, and the SAE's encoder."""
    d, blocks_after = teacher.n_embd, teacher.n_layer - 1 - teacher.layer
    forward = teacher.n_layer * (12 * d * d + seq_len * d) + teacher.vocab_size * d
    backward = blocks_after * (12 * d * d + 2 * seq_len * d) + teacher.vocab_size * d
    return forward + backward + teacher.n_latents * d


def ideal_ratio(shape: StudentShape, teacher: TeacherShape | None = None) -> float:
    """Arithmetic of a CoCoMix step over that of a next-token step, forward and backward; with a teacher, online."""
    ntp = 3 * ntp_forward(shape)
    cost = 3 * cocomix_forward(shape)
    if teacher is not None:
        cost += labels_online(teacher, shape.seq_len)
    return cost / ntp
