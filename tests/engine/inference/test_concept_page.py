"""The page of concepts: text is shown, and is never markup."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from cocomix.inference.concept_cards import Card
from cocomix.inference.concept_page import page, visible
from cocomix.inference.concept_reading import Reading
from cocomix.inference.concept_survey import Followed, Survey


def test_tokens_show_their_white_space_and_are_no_html():
    assert visible(" <a\n\t") == "·&lt;a↵⇥" and visible("") == "∅"


def test_text_cannot_put_markup_into_the_page():
    evil = "<script>alert('x')</script>\" onclick='y' &lt;"
    numbers = np.array([[3]]), np.array([[1.0]]), np.array([[1.0]])
    reading = Reading(np.array([0]), [evil], *numbers, labels=np.array([[3]]), window=4, n_left_out=0)
    followed = Followed(1)
    followed.add(np.array([1.0]), np.array([0]), np.array([0]), np.array([[0, 1]]), 0)
    surveyed = Survey(evil, 2, np.array([0, 0, 0, 1]), {3: followed})
    card = Card(3, 1.0, 1, 1, 1, [(evil, 1.0)], [(evil, 0.5, 0.25)], followed.contexts)
    tokenizer = SimpleNamespace(decode=lambda ids: evil)
    content = page(evil, tokenizer, reading, [card], surveyed, {3: evil}, np.ones(4, dtype=np.float32))
    tags = re.findall(r"<(?=[a-z/!])", content)
    harmless = page(
        "m",
        SimpleNamespace(decode=lambda ids: "t"),
        replace(reading, tokens=["t"]),
        [replace(card, direct=[("t", 1.0)], measured=[("t", 0.5, 0.25)])],
        replace(surveyed, name="c"),
        {3: "n"},
        np.ones(4, dtype=np.float32),
    )
    assert len(tags) == len(re.findall(r"<(?=[a-z/!])", harmless))
    assert content.count("<script>") == 1 and "onclick='y'" not in content
    assert "&lt;script&gt;" in content and "&amp;lt;" in content
