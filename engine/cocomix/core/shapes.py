"""Shapes of a student and of its teacher: what arithmetic, memory and communication follow from."""

from dataclasses import dataclass

from cocomix.core.config import Config


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
    mixing: str = "interleave"
    concept_residual: bool = False
    concept_every: int = 1

    @property
    def positions_per_token(self) -> float:
        """Positions a token in the blocks that see concept positions too; 2 where every token has a concept."""
        return 1 + 1 / self.concept_every


@dataclass(frozen=True)
class TeacherShape:
    """Width, blocks and vocabulary of the teacher, the block m that its SAE reads, the SAE's latents, what picks labels
    among them ("attribution" or "activation"), and whether the teacher gives soft targets for distillation too."""

    n_embd: int
    n_layer: int
    layer: int
    vocab_size: int
    n_latents: int
    labels_by: str | None = "attribution"  # None: it gives no labels
    soft_targets: bool = False


def student_shape(config: Config, vocab_size: int) -> StudentShape:
    """The shape of the config's student; the vocabulary is that of the token files."""
    model = config.model
    return StudentShape(
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        insert_layer=model.insert_layer,
        vocab_size=vocab_size,
        seq_len=config.data.seq_len,
        concept_dim=model.concept_dim,
        concept_topk=model.concept_topk,
        mixing=model.mixing,
        concept_residual=model.concept_residual,
        concept_every=model.concept_every,
    )
