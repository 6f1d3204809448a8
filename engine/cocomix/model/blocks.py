"""The student's transformer blocks: GPT-2's, over T positions or over 2T, and the last one for concepts alone.

Shapes: B sequences, S positions, d width (n_embd), H heads of size D. Parameter names are GPT-2's. `config` is a
`CoCoMixConfig`.
"""

import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from cocomix_kernels import interleaved_attention


class QueryKeyValue(Conv1D):
    """The QKV product; for concept queries, q is computed at the odd positions only."""

    def __init__(self, width: int, n_head: int):
        super().__init__(3 * width, width)
        self.n_head = n_head

    def forward(self, x, concept_queries=False):
        """x [B, S, d] -> q [B, S or S/2, H, D], k, v [B, S, H, D]."""
        width = x.shape[-1]
        if concept_queries:
            q = x[:, 1::2] @ self.weight[:, :width] + self.bias[:width]
            k, v = (x @ self.weight[:, width:] + self.bias[width:]).split(width, dim=-1)
        else:
            q, k, v = super().forward(x).split(width, dim=-1)
        return tuple(t.unflatten(-1, (self.n_head, -1)) for t in (q, k, v))


class ResidualProjection(Conv1D):
    """A projection whose output is added to the residual stream. A type of its own, because transformers calls
    `_init_weights` for modules that hold parameters themselves and skips those that only hold such modules."""


class Attention(nn.Module):
    """Causal self-attention over T or over 2T positions."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer = layer
        self.doubled = layer >= config.doubled_from
        self.has_pairs = config.concept_every == 1  # each token has a concept: a last block needs no other queries
        self.backend: str | None = None  # of interleaved_attention; see CoCoMixModel.set_attention_backend
        self.c_attn = QueryKeyValue(config.n_embd, config.n_head)
        self.c_proj = ResidualProjection(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None, read=None):
        """x [B, S, d] -> [B, S, d], or [B, T, d] where the positions `read` (a slice or an index [T]) are all that is
        wanted. `mask` [B or 1, 1, S, keys] is needed only where the cache already held positions or some tokens are
        padding."""
        concept_queries = read is not None and self.has_pairs
        q, k, v = self.c_attn(x, concept_queries)
        if concept_queries and mask is not None:
            mask = mask[:, :, 1::2]
        if cache is not None:
            k, v = (t.transpose(1, 2) for t in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer))
        if mask is None and self.doubled:
            out = interleaved_attention(q, k, v, backend=None if concept_queries else self.backend)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
        if read is not None and not concept_queries:
            out = out[:, read]
        return self.c_proj(out.flatten(2))


class FeedForward(nn.Module):
    """d -> 4d -> d with the tanh form of GELU."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = ResidualProjection(config.n_embd, 4 * config.n_embd)

    def forward(self, x):
        """x [..., d] -> [..., d]."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, x, mask=None, cache=None, read=None):
        """x [B, S, d] -> [B, S, d]; with `read` (the last block, where it sees concept positions) only those that next
        tokens are read from are computed, [B, T, d]: the others serve as keys and values and for nothing else."""
        attended = self.attn(self.ln_1(x), mask, cache, read)
        x = (x if read is None else x[:, read]) + attended
        return x + self.mlp(self.ln_2(x))
