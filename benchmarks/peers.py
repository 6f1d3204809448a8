"""Whole models to compare a training step with, on the weights of ours: the public code's way, and transformers' GPT-2.

A peer lends a model of ours another forward pass for a while. Weights, gradients, DeepSpeed's engine and the optimizer
stay the same ones, so a comparison needs no second copy in memory, and losses and gradients can be compared in tests.
`profile_against.py` measures them.

`public_student` computes the student as the paper's public code does: logits, masked copy and float32 cross-entropies
over [N, C], a dense product for the compress layer, `stack` and `view`, all 2T queries in the last block, and [N, V]
logits. `PublicTeacher` takes labels with a full backward pass, weight gradients included, and dense latents. To their
advantage both use the attention that ours does. Source: CoCoMix (arXiv 2502.08524).
"""

import contextlib
import functools
import importlib.util

import public_way
import torch
import torch.nn.functional as F

from cocomix.model.model import CoCoMixCausalLMOutput
from cocomix_kernels.concept_head.op import ConceptHead


@contextlib.contextmanager
def _forwards(replaced: dict):
    """Inside the block the modules compute as `replaced` (module -> function) says. One that is compiled has its own
    `forward` as an attribute, and gets it back."""
    before = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def public_student(model):
    """A function that returns contexts inside which `model` (a CoCoMix student) trains the public code's way."""
    transformer, config = model.transformer, model.config
    last, head, compress, lm_head = (
        transformer.h[-1],
        transformer.concept_predictor,
        transformer.compress_layer,
        model.lm_head,
    )

    def predict(x, k, labels=None):
        return ConceptHead(*public_way.concept_head(x, head.weight, head.bias, k, labels))

    def mix(hidden, masked, _indices, pre_bias, mean, std, mixing, _residual):  # which the public code does not know
        concepts = masked, compress.weight.t(), compress.bias, pre_bias, mean.to(masked.dtype), std.to(masked.dtype)
        if mixing == "interleave":
            return public_way.mix(hidden, *concepts)
        return hidden + public_way.compress(*concepts)

    def all_queries(x, mask=None, cache=None, read=None, block=last.forward):
        out = block(x, mask, cache)
        return out if read is None else out[:, read]

    replaced = {head: predict, compress: mix, lm_head: functools.partial(_loss_of_logits, lm_head.weight)}
    if config.mixing == "interleave":
        replaced[last] = all_queries
    return lambda: _forwards(replaced)


def _loss_of_logits(weight, x, labels):
    """Mean cross-entropy over float32 logits [N, V]; x [..., d], labels [...]."""
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class PublicTeacher:
    """Labels as the public code takes them, by the model and SAE of a `ConceptTeacher`."""

    def __init__(self, teacher):
        self._model, self._sae = teacher.model, teacher.sae
        self._layer, self._label_topk = teacher.layer, teacher.label_topk

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Labels of windows input_ids [B, T] -> [B, T, K] int64: the K largest attributions, zeros among them."""
        residual, gradient = self._residual_and_gradient(input_ids)
        with torch.no_grad():
            x = self._sae.normalize(residual.flatten(0, 1))[0] - self._sae.pre_bias
            latents = public_way.sae_encode(
                x.to(self._sae.W_enc.dtype), self._sae.W_enc, self._sae.latent_bias, self._sae.k
            )
            _, labels = public_way.attribution(latents, gradient.flatten(0, 1), self._sae.decoder.t(), self._label_topk)
        return labels.unflatten(0, input_ids.shape)

    def targets(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`labels` as an entry of a batch: `concept_labels`."""
        return {"concept_labels": self.labels(input_ids)}

    def _residual_and_gradient(self, input_ids):
        """Both [B, T, d], by a backward pass into every weight."""
        from cocomix.teacher.language_model import transformer_blocks

        found = []

        def keep(_module, _args, output):
            found.append(output[0] if isinstance(output, tuple) else output)
            found[0].retain_grad()

        handle = transformer_blocks(self._model)[self._layer].register_forward_hook(keep)
        self._model.requires_grad_(True)
        try:
            with torch.enable_grad():
                hidden = self._model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
                _loss_of_logits(self._model.get_output_embeddings().weight, hidden[:, :-1], input_ids[:, 1:]).backward()
        finally:
            handle.remove()
            self._model.requires_grad_(False)
            self._model.zero_grad(set_to_none=True)
        return found[0].detach(), found[0].grad


def transformers_gpt2(model, compiled: bool):
    """A function that returns contexts inside which `model` (with mixing="none") trains as transformers' GPT-2.

    Attention by flash_attn where it is installed and fits, else by PyTorch. On a GPU with Liger-Kernel its fused
    linear cross-entropy, else the cross-entropy of [N, V] logits in float32, which `compiled` fuses.
    """
    weight = model.lm_head.weight
    gpt2 = _shared_gpt2(model)
    loss = _liger_loss() if weight.is_cuda else None
    if loss is not None:
        hidden_states = torch.compile(gpt2.transformer, dynamic=False) if compiled else gpt2.transformer

        def next_token_loss(input_ids):
            hidden = hidden_states(input_ids, use_cache=False).last_hidden_state[:, :-1]
            return loss(weight, hidden.flatten(0, 1), input_ids[:, 1:].flatten())
    else:

        def next_token_loss(input_ids):
            hidden = gpt2.transformer(input_ids, use_cache=False).last_hidden_state[:, :-1]
            return _loss_of_logits(weight, hidden, input_ids[:, 1:])

        if compiled:
            next_token_loss = torch.compile(next_token_loss, dynamic=False)

    def forward(input_ids, **_):
        ntp_loss = next_token_loss(input_ids)
        return CoCoMixCausalLMOutput(loss=ntp_loss, ntp_loss=ntp_loss)

    return lambda: _forwards({model: forward})


def _shared_gpt2(model):
    """transformers' GPT-2 whose parameters are the model's own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours, weight = model.config, model.lm_head.weight
    flash = weight.is_cuda and weight.dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None
    config = GPT2Config(
        n_embd=ours.n_embd,
        n_layer=ours.n_layer,
        n_head=ours.n_head,
        vocab_size=ours.vocab_size,
        n_positions=ours.n_positions,
        layer_norm_epsilon=ours.layer_norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="flash_attention_2" if flash else "sdpa",
    )
    with weight.device:
        gpt2 = GPT2LMHeadModel(config)
    gpt2.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return gpt2.train(model.training)


def _liger_loss():
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss()
