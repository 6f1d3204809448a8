"""The configuration of a student, as transformers saves and loads it."""

from transformers.configuration_utils import PreTrainedConfig

from cocomix.core.methods import MIXING, doubles_sequence, predicts_concepts
from cocomix.model.layout import Layout


class CoCoMixConfig(PreTrainedConfig):
    """Shape of a CoCoMix model.

    `n_positions` counts tokens (T), never the doubled length. `mixing` is "interleave" (the paper's method), "add"
    (h + c, the sequence keeps T positions), "predict" (concepts are predicted and not mixed in), "pause" (a learned
    vector in each concept's place) or "none" (plain GPT-2). For the two that have concept positions: with
    `concept_residual` what stands there is added to its token's hidden state instead of standing alone; with
    `concept_every` = m there is one after every m-th token only, and the other tokens' next tokens are read from their
    own positions. `distillation_weight` is that of KL(teacher || student) where soft targets are given. Raises
    `ValueError` for values that contradict each other.
    """

    model_type = "cocomix"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        n_embd: int = 512,
        n_layer: int = 8,
        n_head: int = 8,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        concept_dim: int = 32768,
        concept_topk: int = 32,
        insert_layer: int = 3,
        concept_loss_weight: float = 0.1,
        mixing: str = "interleave",
        concept_residual: bool = False,
        concept_every: int = 1,
        distillation_weight: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        self.n_embd, self.n_layer, self.n_head = n_embd, n_layer, n_head
        self.vocab_size, self.n_positions = vocab_size, n_positions
        self.concept_dim, self.concept_topk, self.insert_layer = concept_dim, concept_topk, insert_layer
        self.concept_loss_weight, self.mixing = concept_loss_weight, mixing
        self.concept_residual, self.concept_every = concept_residual, concept_every
        self.distillation_weight = distillation_weight
        self.layer_norm_epsilon, self.initializer_range = layer_norm_epsilon, initializer_range
        self.use_cache = use_cache
        self._check()
        super().__init__(
            **kwargs
            | {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "tie_word_embeddings": tie_word_embeddings}
        )

    def _check(self):
        if self.mixing not in MIXING:
            raise ValueError(f"mixing is {self.mixing!r}; it must be one of {', '.join(MIXING)}")
        if self.concept_residual and self.mixing in ("add", "predict"):
            raise ValueError(f"concept_residual needs concept positions, which mixing={self.mixing} does not have")
        if self.concept_every > 1 and self.mixing in ("add", "predict"):
            raise ValueError(f"concept_every needs concept positions, which mixing={self.mixing} does not have")
        for name in ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions", "concept_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.mixing == "none":
            return
        if not 0 <= self.insert_layer < self.n_layer:
            raise ValueError(f"insert_layer ({self.insert_layer}) must be >= 0 and below n_layer ({self.n_layer})")
        if predicts_concepts(self.mixing) and not 0 < self.concept_topk <= self.concept_dim:
            raise ValueError(
                f"concept_topk ({self.concept_topk}) must be positive and at most concept_dim ({self.concept_dim})"
            )

    @property
    def layout(self) -> Layout:
        """Where concept positions stand."""
        return Layout(self.concept_every)

    @property
    def concept_tokens(self) -> slice:
        """The tokens of a window that have a concept, and learn from concept labels."""
        return self.layout.with_concept()

    @property
    def doubled_from(self) -> int:
        """Index of the first block that sees concept positions too; n_layer where none does."""
        return self.insert_layer if doubles_sequence(self.mixing) else self.n_layer
