"""Where concept positions stand, against a loop over tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cocomix.model.layout import Layout


def naive(tokens, every):
    """(token, whether it is the token's concept) by position."""
    places = []
    for token in range(tokens):
        places.append((token, False))
        if (token + 1) % every == 0:
            places.append((token, True))
    return places


@given(tokens=st.integers(0, 40), every=st.integers(1, 9))
def test_counts_and_tokens_are_those_of_a_loop(tokens, every):
    layout, places = Layout(every), naive(tokens, every)
    assert layout.positions(tokens) == len(places) and layout.tokens(len(places)) == tokens
    assert layout.token_of(len(places)).tolist() == [token for token, _ in places]


@given(past=st.integers(0, 20), new=st.integers(1, 30), every=st.integers(1, 9))
def test_a_call_continues_where_the_last_one_stopped(past, new, every):
    layout = Layout(every)
    places = naive(past + new, every)[layout.positions(past) :]
    chosen = torch.arange(past, past + new)[layout.with_concept(past)]
    assert chosen.tolist() == [token for token, is_concept in places if is_concept]
    hidden = torch.arange(past, past + new, dtype=torch.float64)[None, :, None].requires_grad_()
    mixed = layout.interleave(hidden, -1 - chosen[None, :, None].double(), past)
    assert mixed[0, :, 0].tolist() == [-1 - token if is_concept else token for token, is_concept in places]
    read = layout.reading(new, past)
    last = {token: position for position, (token, _) in enumerate(places)}
    assert read.tolist() == [last[token] for token in range(past, past + new)]
