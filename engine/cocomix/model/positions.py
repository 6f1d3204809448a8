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


def attention_masks(input_ids, attention_mask, n_past: int, layout: Layout | None):
    """Explicit masks over tokens and over all positions of a layout; None where plain causal attention will do.

    input_ids [B, T], attention_mask [B, past + T], 0 at padding -> bool [B or 1, 1, T, past + T] and, with a layout,
    the same over its positions (for T tokens with a concept each [B or 1, 1, 2T, 2 (past + T)]), True where attended.
    Raises `ValueError` where padding before the text would move its concept positions.
    """
    keep = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if keep is not None and layout is not None:
        _require_whole_groups(keep, layout)
    if n_past == 0 and keep is None:
        return None, None
    token_mask = _causal_mask(n_past, input_ids.shape[1], keep, input_ids.device)
    if layout is None:
        return token_mask, None
    past, end = layout.positions(n_past), layout.positions(n_past + input_ids.shape[1])
    keep = None if keep is None else keep[:, layout.token_of(end, input_ids.device)]
    return token_mask, _causal_mask(past, end - past, keep, input_ids.device)


def _require_whole_groups(keep, layout: Layout) -> None:
    """Raise `ValueError` unless padding on the left counts a multiple of the tokens that share a concept position."""
    padding = keep.long().argmax(1)
    if layout.every > 1 and bool((padding % layout.every).any()):
        raise ValueError(
            f"padding on the left must be a multiple of concept_every={layout.every} tokens, since concept positions "
            f"are counted from the start of a row; the rows have {padding.tolist()}: run prompts one by one, or pad on "
            "the right"
        )


def _causal_mask(n_past, n_new, keep, device):
    keys = torch.arange(n_past + n_new, device=device)
    queries = keys[n_past:, None]
    mask = (keys <= queries)[None, None]
    if keep is None:
        return mask
    # A padding position still sees itself: a row without any key would be NaN and spoil what it is a value for.
    return (mask & keep[:, None, None, :]) | (keys == queries)
