"""The student: a GPT-2 that predicts concepts, compresses them and interleaves them with its hidden states.

Shapes: B sequences, T tokens, d width (n_embd), C concepts (concept_dim), k kept concepts (concept_topk), K labels.
Blocks 0..insert_layer-1 see T positions, the others 2T (mixing="interleave"): h_0, c_0, h_1, c_1, ... (with
concept_residual h_0 + c_0 in c_0's place).
Parameter names are those of GPT-2 and of the paper's public code, so checkpoints of both load by name.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from cocomix.core.methods import mixes_concepts, predicts_concepts
from cocomix.model.blocks import Block, ResidualProjection
from cocomix.model.config import CoCoMixConfig
from cocomix.model.positions import (
    CACHE_NAME,
    BothCacheNames,
    attention_masks,
    documents_of,
    given_cache,
    prepare_cache,
    token_positions,
)
from cocomix_kernels import (
    FullTargets,
    TopTargets,
    concept_add,
    concept_head,
    concept_mix,
    linear_cross_entropy,
    linear_distillation,
)

_NORM_EPS = 1e-5  # added to the standard deviation, after the root


@dataclass
class CoCoMixModelOutput(BothCacheNames, BaseModelOutputWithPast):
    """Output of the blocks: transformers' (`last_hidden_state` [B, T, d], after the final norm; the cache), and the
    concept fields, which are None where no concepts are predicted."""

    concept_loss: torch.Tensor | None = None  # scalar float32, None without concept labels
    concept_values: torch.Tensor | None = None  # [B, T, k] kept concept logits, descending
    concept_indices: torch.Tensor | None = None  # [B, T, k] int64


@dataclass
class CoCoMixCausalLMOutput(BothCacheNames, CausalLMOutputWithPast):
    """Output of `CoCoMixForCausalLM`: transformers' (`logits` [B, T, V]; the cache), and what its loss is made of.

    `loss` is ntp_loss + concept_loss_weight * concept_loss + distillation_weight * distillation_loss; what has no term
    is None.
    """

    ntp_loss: torch.Tensor | None = None  # mean next-token cross-entropy
    concept_loss: torch.Tensor | None = None
    distillation_loss: torch.Tensor | None = None  # KL(teacher || student); with it ntp_loss carries no gradient
    concept_values: torch.Tensor | None = None
    concept_indices: torch.Tensor | None = None


class ConceptPredictor(nn.Linear):
    """W_p and b_p: the linear layer over concepts, with its TopK and its loss."""

    steering = None  # what takes the place of `concept_head` while `cocomix.steer` changes the logits

    def forward(self, x, k, labels=None):
        """x [N, d], labels [N, K] or None -> `ConceptHead`."""
        if self.steering is not None:
            if self.training:
                raise ValueError("a model is never steered while it trains: call eval(), or leave the steer() block")
            return self.steering(x, self.weight, self.bias, k, labels)
        return concept_head(x, self.weight, self.bias, k, labels)


class CompressLayer(nn.Module):
    """W_c and b_c: kept concept logits -> one continuous concept a token. The weight holds one row a concept."""

    def __init__(self, concept_dim: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(concept_dim, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden, values, indices, pre_bias, mean, std, mixing, residual=False):
        """hidden [B, T, d] -> [B, 2T, d] for "interleave", where `residual` counts, [B, T, d] for "add"."""
        arguments = (hidden, values, indices, self.weight, self.bias, pre_bias, mean, std)
        return concept_mix(*arguments, residual=residual) if mixing == "interleave" else concept_add(*arguments)


class PauseTokens(nn.Module):
    """One learned vector after every hidden state, where CoCoMix has its concepts."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, hidden, residual):
        """hidden [B, T, d] -> [B, 2T, d]; with `residual` the vector is added to the hidden state."""
        vector = self.weight.to(hidden.dtype)
        pauses = hidden + vector if residual else vector.expand_as(hidden)
        return torch.stack([hidden, pauses], dim=2).flatten(1, 2)


class LanguageModelHead(nn.Linear):
    """The vocabulary product, or its loss without logits."""

    def forward(self, x, labels=None, targets=None, distillation_weight=0.0):
        """x [..., d] -> logits [..., V]; with labels [...], the mean cross-entropy (-100 is ignored); with soft targets
        [...] too, a `DistillationLoss`."""
        if labels is None:
            return super().forward(x)
        x, labels = x.flatten(0, -2), labels.flatten()
        if targets is None:
            return linear_cross_entropy(x, self.weight, labels)
        return linear_distillation(x, self.weight, labels, targets, distillation_weight)


class CoCoMixPreTrainedModel(PreTrainedModel):
    """Initialisation and loading as transformers expects them."""

    config_class = CoCoMixConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, ResidualProjection):  # two residual additions a block
            std /= math.sqrt(2 * self.config.n_layer)
        if isinstance(module, (Conv1D, nn.Linear, nn.Embedding, CompressLayer, PauseTokens)):
            nn.init.normal_(module.weight, std=std)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, CoCoMixModel) and module.pre_bias is not None:
            nn.init.zeros_(module.pre_bias)


class CoCoMixModel(CoCoMixPreTrainedModel):
    """Embeddings, blocks, concept prediction and mixing, final norm."""

    def __init__(self, config: CoCoMixConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False  # of each block; set by gradient_checkpointing_enable()
        self.pre_bias = nn.Parameter(torch.zeros(config.n_embd)) if predicts_concepts(config.mixing) else None
        if predicts_concepts(config.mixing):
            self.concept_predictor = ConceptPredictor(config.n_embd, config.concept_dim)
        if mixes_concepts(config.mixing):
            self.compress_layer = CompressLayer(config.concept_dim, config.n_embd)
        if config.mixing == "pause":
            self.pause_tokens = PauseTokens(config.n_embd)
        self.post_init()

    def get_input_embeddings(self):
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.wte = value

    def set_attention_backend(self, backend: str | None) -> None:
        """Choose the backend of `interleaved_attention` over all queries; None leaves the choice to its rule.

        The last block's concept queries always follow the rule: the libraries do not know them.
        """
        for block in self.h:
            cast(Block, block).attn.backend = backend

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        concept_labels=None,
        cache=None,
        **_,
    ):
        """input_ids [B, T], concept_labels [B, T, K] (-1: none) -> `CoCoMixModelOutput`.

        `attention_mask` [B, past + T] is 0 at padding. `position_ids` [B, T] that start again in a row pack several
        documents into it, which do not see one another. `past_key_values` is the older name of `cache`. Raises
        `ValueError` where past + T exceeds n_positions, where both names are given, and for documents that begin
        inside a group of tokens with one concept position.
        """
        config = self.config
        cache = given_cache(cache, past_key_values)
        if use_cache or cache is not None:
            cache = prepare_cache(cache, config.n_layer, config.doubled_from, config.layout)
        n_past = 0 if cache is None else cache.get_seq_length()
        self._check_length(n_past + input_ids.shape[1])
        positions, documents = position_ids, None
        if positions is None:
            positions = token_positions(input_ids, attention_mask, n_past)
        elif n_past == 0:
            positions = positions.expand(input_ids.shape)
            documents = documents_of(positions, attention_mask)
        doubled = config.doubled_from < config.n_layer
        layout = config.layout if doubled else None
        token_mask, doubled_mask = attention_masks(input_ids, attention_mask, n_past, layout, documents)
        x = self.wte(input_ids) + self.wpe(positions)
        concepts, read = None, None
        for layer, block in enumerate(self.h):
            if layer == config.insert_layer and config.mixing != "none":
                x, concepts = self._mix(x, concept_labels, n_past)
            mask = token_mask
            if layer >= config.doubled_from:
                mask = doubled_mask
                if layer == config.n_layer - 1:
                    read = self._reading(input_ids, n_past)
            if self.gradient_checkpointing and self.training and cache is None:
                x = self._gradient_checkpointing_func(block, x, mask, None, read)
            else:
                x = block(x, mask, cache, read)
        concepts = concepts or {}
        return CoCoMixModelOutput(last_hidden_state=self.ln_f(x), **{CACHE_NAME: cache}, **concepts)

    def _reading(self, input_ids, n_past):
        """Which of a call's positions its next tokens are read from: the concepts', where every token has one."""
        if self.config.concept_every == 1:
            return slice(1, None, 2)
        return self.config.layout.reading(input_ids.shape[1], n_past, input_ids.device)

    def _mix(self, hidden, labels, n_past):
        """What block `insert_layer` gets for hidden [B, T, d], and what concepts were predicted."""
        config = self.config
        if config.concept_every == 1:
            return self._with_concepts(hidden, labels)
        chosen = config.layout.with_concept(n_past)
        labels = None if labels is None else labels[:, chosen]
        pairs, concepts = self._with_concepts(hidden[:, chosen], labels)
        return config.layout.interleave(hidden, pairs[:, 1::2], n_past), concepts

    def _with_concepts(self, hidden, labels):
        """The hidden states of tokens that all have a concept, mixed, and what concepts were predicted."""
        config = self.config
        if config.mixing == "pause":
            return self.pause_tokens(hidden, config.concept_residual), {}
        wide = hidden.float() if hidden.dtype != torch.float64 else hidden
        std, mean = torch.std_mean(wide, dim=-1, keepdim=True)
        normalised = ((wide - mean) / (std + _NORM_EPS)).to(hidden.dtype) - self.pre_bias
        labels = None if labels is None else labels.flatten(0, 1)
        head = self.concept_predictor(normalised.flatten(0, 1), config.concept_topk, labels)
        values, indices = (t.unflatten(0, hidden.shape[:2]) for t in (head.values, head.indices))
        concepts = {"concept_loss": head.loss, "concept_values": values, "concept_indices": indices}
        if not mixes_concepts(config.mixing):
            return hidden, concepts
        of_concepts = (values, indices, self.pre_bias, mean, std)
        return self.compress_layer(hidden, *of_concepts, config.mixing, config.concept_residual), concepts

    def _check_length(self, length):
        if length > self.config.n_positions:
            raise ValueError(
                f"the sequence has {length} tokens but the model's context holds n_positions={self.config.n_positions}"
            )


class CoCoMixForCausalLM(CoCoMixPreTrainedModel, GenerationMixin):
    """CoCoMix language model with a tied head: trains, generates, saves and loads as any transformers model."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: CoCoMixConfig):
        super().__init__(config)
        self.transformer = CoCoMixModel(config)
        self.lm_head = LanguageModelHead(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        concept_labels=None,
        concept_token_count=None,
        soft_target_ids=None,
        soft_target_log_probs=None,
        teacher_hidden=None,
        teacher_head=None,
        num_items_in_batch=None,
        return_logits=None,
        logits_to_keep=0,
        cache=None,
        **_,
    ):
        """Next-token prediction, concept prediction and distillation.

        input_ids [B, T] int64; labels [B, T] (usually input_ids: shifted inside, -100 is ignored); concept_labels
        [B, T, K] (-1: none), ignored where no concepts are predicted. `concept_token_count` replaces the number of
        labelled tokens that the concept loss is divided by, so that micro batches add up to one batch. With the
        teacher's J likeliest tokens (`soft_target_ids`, `soft_target_log_probs` [B, T, J]) or its last hidden states
        and head (`teacher_hidden` [B, T, d_t], `teacher_head` [V_t, d_t]) the student is distilled too.
        `num_items_in_batch`, which transformers' Trainer passes, is the number of predicted tokens in all micro batches
        of a step: the losses are then this micro batch's share, by predicted tokens, and add up to those of the step.
        Logits are computed when labels is None or `return_logits`, for the last `logits_to_keep` positions (0: all).
        `past_key_values` is the older name of `cache`. Raises `ValueError` where both are given.
        """
        use_cache = self.config.use_cache and labels is None if use_cache is None else use_cache
        out = self.transformer(
            input_ids, attention_mask, position_ids, given_cache(cache, past_key_values), use_cache, concept_labels
        )
        hidden, concept_loss = out.last_hidden_state, out.concept_loss
        loss = ntp_loss = distillation_loss = logits = None
        if labels is None or return_logits:
            logits = self.lm_head(hidden[:, -logits_to_keep:])
        if labels is not None:
            targets = _soft_targets(soft_target_ids, soft_target_log_probs, teacher_hidden, teacher_head)
            loss, ntp_loss, distillation_loss = self._next_token_losses(hidden, labels, targets, num_items_in_batch)
        if concept_loss is not None and concept_labels is not None and concept_token_count is not None:
            labelled = (concept_labels[:, self.config.concept_tokens] >= 0).any(-1).sum()
            concept_loss = concept_loss * (labelled / concept_token_count)
        if concept_loss is not None and labels is not None and num_items_in_batch is not None:
            concept_loss = concept_loss * ((labels[:, 1:] != -100).sum() / num_items_in_batch)
        if loss is not None and concept_loss is not None:
            loss = loss + self.config.concept_loss_weight * concept_loss
        return CoCoMixCausalLMOutput(
            loss=loss,
            ntp_loss=ntp_loss,
            concept_loss=concept_loss,
            distillation_loss=distillation_loss,
            logits=logits,
            concept_values=out.concept_values,
            concept_indices=out.concept_indices,
            **{CACHE_NAME: getattr(out, CACHE_NAME) if use_cache else None},
        )

    def concept_parameters(self) -> set[str]:
        """Names of the parameters that next-token prediction alone (mixing="none") does not have."""
        layers = ("pre_bias", "concept_predictor", "compress_layer", "pause_tokens")
        return {name for name, _ in self.named_parameters() if name.split(".")[1] in layers}

    def _next_token_losses(self, hidden, labels, targets, n_predicted_in_batch=None):
        """What the head's part of the loss is, and of it the mean cross-entropy and the KL divergence, None without
        soft targets."""
        if hidden.shape[1] < 2:  # a one-token window predicts nothing
            nothing = hidden.sum() * 0.0
            return nothing, nothing, None if targets is None else nothing.detach()
        hidden, labels, share = hidden[:, :-1], labels[:, 1:], 1.0
        if n_predicted_in_batch is not None:
            n_predicted = (labels != -100).sum()
            if n_predicted == 0:
                return hidden.sum() * 0.0, hidden.new_zeros(()), None if targets is None else hidden.new_zeros(())
            share = n_predicted / n_predicted_in_batch
        if targets is None:
            loss = self.lm_head(hidden, labels) * share
            return loss, loss, None
        found = self.lm_head(hidden, labels, targets.of_predictions(), self.config.distillation_weight)
        return tuple(part * share for part in found)

    @classmethod
    def from_reference(cls, path_or_state_dict, *, concept_dim, insert_layer, concept_topk, n_head=None):
        """Load a checkpoint of the paper's public code: a folder, or a bare state dict (which needs `n_head`).

        The public code stores `compress_layer.weight` as [d, C]; it is transposed here. Raises `CocomixError` where
        the checkpoint and the given settings contradict each other.
        """
        from cocomix.model.conversion import from_reference

        return from_reference(cls, path_or_state_dict, concept_dim, insert_layer, concept_topk, n_head)

    @classmethod
    def from_gpt2(cls, path_or_model):
        """Take over any GPT-2 in transformers' format (a folder, "hf:NAME" on the hub, or a model), as mixing="none".

        Raises `CocomixError` for another architecture or a variant of GPT-2 that computes something else.
        """
        from cocomix.model.conversion import from_gpt2

        return from_gpt2(cls, path_or_model)


def _soft_targets(ids, log_probs, teacher_hidden, teacher_head):
    """What was given of the teacher's distribution, None for nothing."""
    if ids is not None:
        return TopTargets(ids, log_probs)
    return None if teacher_hidden is None else FullTargets(teacher_hidden, teacher_head)


AutoConfig.register("cocomix", CoCoMixConfig, exist_ok=True)

AutoModelForCausalLM.register(CoCoMixConfig, CoCoMixForCausalLM, exist_ok=True)
