"""What generation keeps of a sequence's past: caches and masks over tokens and over doubled positions."""

import dataclasses

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from cocomix.model.layout import Layout

# What the installed version of transformers calls the cache in arguments and outputs: "past_key_values" until 5.23,
# "cache" from 5.24, whose outputs answer to the old name too (until 5.40).
CACHE_NAME = next(f.name for f in dataclasses.fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, whichever of its two names it was given by. Raises `ValueError` where both were used."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of the same argument: give one of them")
    return past_key_values if cache is None else cache


class BothCacheNames:
    """An output whose cache answers to `cache` and to `past_key_values`, whichever the installed transformers has."""

    def __getattr__(self, name):
        if name in ("cache", "past_key_values") and name != CACHE_NAME:
            return getattr(self, CACHE_NAME)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class DoubledLayer(DynamicLayer):
    """Keys and values of a block that sees concept positions too; its lengths count tokens, as all lengths do that
    transformers asks for."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout

    def get_seq_length(self) -> int:
        """Tokens that the layer holds."""
        return self.layout.tokens(super().get_seq_length())

    def crop(self, tokens: int) -> None:
        """Forget the last -`tokens` tokens, or (> 0, as older versions of transformers call it) all but the first."""
        if self.keys is not None and self.values is not None:
            kept = tokens if tokens > 0 else self.get_seq_length() + tokens
            kept = self.layout.positions(kept)
            self.keys, self.values = self.keys[..., :kept, :], self.values[..., :kept, :]


def prepare_cache(cache: Cache | None, n_layer: int, doubled_from: int, layout: Layout) -> Cache:
    """A cache whose layers from `doubled_from` on hold concept positions too: a new one, or `cache` if it is still
    empty or already so. Raises `ValueError` for a cache that does not simply grow."""
    cache = DynamicCache() if cache is None else cache
    cache.layers.extend(DynamicLayer() for _ in range(n_layer - len(cache.layers)))
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DoubledLayer):
            raise ValueError(
                f"a cache with a {type(layer).__name__} is not supported: take a DynamicCache, which "
                "generate() does by default"
            )
        if index >= doubled_from and type(layer) is DynamicLayer:
            cache.layers[index] = DoubledLayer(layout)
    return cache


def token_positions(input_ids, attention_mask, n_past: int):
    """Position of each token [B, T] (or [T], without padding) in its text: padding [B, past + T] does not count."""
    end = n_past + input_ids.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, n_past:end]
    return torch.arange(n_past, end, device=input_ids.device)


def documents_of(position_ids, attention_mask) -> torch.Tensor | None:
    """The number of each token's document [B, T] where positions [B, T] start again in a row, as transformers packs
    documents; None where they do not. Padding, 0 in attention_mask [B, T], begins none."""
    begins = position_ids.diff(dim=-1) <= 0
    if attention_mask is not None:
        keep = attention_mask.bool()
        begins = begins & keep[:, 1:] & keep[:, :-1]
    if not bool(begins.any()):
        return None
    return torch.nn.functional.pad(begins.long().cumsum(-1), (1, 0))


def attention_masks(input_ids, attention_mask, n_past: int, layout: Layout | None, documents=None):
    """Explicit masks over tokens and over all positions of a layout; None where plain causal attention will do.

    input_ids [B, T], attention_mask [B, past + T], 0 at padding, documents [B, past + T] (see `documents_of`) -> bool
    [B or 1, 1, T, past + T] and, with a layout, the same over its positions (for T tokens with a concept each
    [B or 1, 1, 2T, 2 (past + T)]), True where attended. Raises `ValueError` where padding before the text, or where a
    document begins, would move its concept positions.
    """
    keep = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if layout is not None:
        _require_whole_groups(keep, documents, layout)
    if n_past == 0 and keep is None and documents is None:
        return None, None
    token_mask = _causal_mask(n_past, input_ids.shape[1], keep, documents, input_ids.device)
    if layout is None:
        return token_mask, None
    past, end = layout.positions(n_past), layout.positions(n_past + input_ids.shape[1])
    tokens = layout.token_of(end, input_ids.device)
    keep, documents = (None if of_tokens is None else of_tokens[:, tokens] for of_tokens in (keep, documents))
    return token_mask, _causal_mask(past, end - past, keep, documents, input_ids.device)


def _require_whole_groups(keep, documents, layout: Layout) -> None:
    """Raise `ValueError` unless padding on the left, and every document before another, counts a multiple of the tokens
    that share a concept position."""
    if layout.every == 1:
        return
    if keep is not None:
        padding = keep.long().argmax(1)
        if bool((padding % layout.every).any()):
            raise ValueError(
                f"padding on the left must be a multiple of concept_every={layout.every} tokens, since concept "
                f"positions are counted from the start of a row; the rows have {padding.tolist()}: run prompts one by "
                "one, or pad on the right"
            )
    if documents is not None:
        begin = documents.diff(dim=-1).nonzero()[:, 1] + 1
        if bool((begin % layout.every).any()):
            raise ValueError(
                f"packed documents must begin at multiples of concept_every={layout.every} tokens, since concept "
                f"positions are counted from the start of a row; they begin at {begin.tolist()}: pack one a row"
            )


def _causal_mask(n_past, n_new, keep, documents, device):
    keys = torch.arange(n_past + n_new, device=device)
    queries = keys[n_past:, None]
    mask = (keys <= queries)[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, n_past:, None] == documents[:, None, None, :])
    if keep is None:
        return mask
    # A padding position still sees itself: a row without any key would be NaN and spoil what it is a value for.
    return (mask & keep[:, None, None, :]) | (keys == queries)
