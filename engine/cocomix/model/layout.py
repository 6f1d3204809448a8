"""Where concept positions stand in a sequence: one after every `every`-th token.

Shapes: B sequences, T tokens, S = T + T // every positions, d width. Tokens and positions are counted from the start of
the sequence; a call sees the `n_past` tokens before it in its cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """h_0, ..., h_{every-1}, c, h_every, ...: with `every` = 1 each token has a concept, as in the paper."""

    every: int

    def positions(self, tokens: int) -> int:
        """Positions that the first `tokens` tokens take."""
        return tokens + tokens // self.every

    def tokens(self, positions: int) -> int:
        """Tokens that have so many positions."""
        return positions - positions // (self.every + 1)

    def with_concept(self, n_past: int = 0) -> slice:
        """Which of the tokens of a call are followed by a concept position."""
        return slice(self.every - 1 - n_past % self.every, None, self.every)

    def interleave(self, hidden: Tensor, concepts: Tensor, n_past: int = 0) -> Tensor:
        """hidden [B, T, d] and the concepts [B, ., d] of its tokens that have one -> all positions [B, ., d]."""
        first = min(self.every - n_past % self.every, hidden.shape[1])  # tokens until the first concept
        parts = [hidden[:, :first], concepts[:, :1]]
        hidden, concepts = hidden[:, first:], concepts[:, 1:]
        groups = hidden.shape[1] // self.every
        whole = hidden[:, : groups * self.every].unflatten(1, (groups, self.every))
        parts.append(torch.cat([whole, concepts[:, :, None]], 2).flatten(1, 2))
        return torch.cat([*parts, hidden[:, groups * self.every :]], 1)

    def reading(self, n_tokens: int, n_past: int = 0, device: torch.device | None = None) -> Tensor:
        """The position, among those of a call, that each of its tokens' next-token prediction is read from [T]: the
        token's concept position where it has one, else its own."""
        tokens = torch.arange(n_past, n_past + n_tokens, device=device)
        return tokens + (tokens + 1) // self.every - self.positions(n_past)

    def token_of(self, n_positions: int, device: torch.device | None = None) -> Tensor:
        """The token that each of the first positions belongs to [n_positions]."""
        positions = torch.arange(n_positions, device=device)
        group, place = positions // (self.every + 1), positions % (self.every + 1)
        return group * self.every + place.clamp(max=self.every - 1)
