"""The page of concepts: text is shown, and is never markup."""

from cocomix.inference.concept_page import visible


def test_tokens_show_their_white_space_and_are_no_html():
    assert visible(" <a\n\t") == "·&lt;a↵⇥" and visible("") == "∅"
