import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocomix.data.separators import split_documents

SEPARATOR = "<|endoftext|>"


def documents(texts, separator=SEPARATOR):
    return ["".join(parts) for parts in split_documents(texts, separator)]


def cut(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


WITHOUT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1).filter(
    lambda text: text[0] not in "\r\n" and text[-1] not in "\r\n"
)


@given(st.lists(WITHOUT, min_size=1), st.sampled_from(["", "\n", "\r\n"]), st.integers(1, 40), st.booleans())
def test_what_comes_out_is_what_was_put_together(texts, line_end, size, ends_with_separator):
    between = f"{line_end}{SEPARATOR}{line_end}"
    whole = between.join(texts) + (between if ends_with_separator else "")
    assert documents(cut(whole, size)) == texts


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("one", ["one"]),
        (f"one{SEPARATOR}", ["one"]),
        (f"{SEPARATOR}one", ["", "one"]),
        (f"one\n\n{SEPARATOR}\n\ntwo", ["one\n", "\ntwo"]),
        (f"one{SEPARATOR}{SEPARATOR}two", ["one", "", "two"]),
        ("one<|endoftext|two", ["one<|endoftext|two"]),
    ],
)
def test_one_end_of_line_goes_with_a_separator_and_all_else_stays(text, expected, size):
    assert documents(cut(text, size)) == expected


def test_what_is_not_read_of_a_document_is_passed_over():
    stream = split_documents(cut(f"{'a' * 500}{SEPARATOR}b{SEPARATOR}c", 10), SEPARATOR)
    assert next(next(stream)) is not None
    assert ["".join(parts) for parts in stream] == ["b", "c"]


def test_little_is_held_however_long_a_document_is():
    longest = max(len(part) for parts in split_documents(("a" * 1000 for _ in range(100)), SEPARATOR) for part in parts)
    assert longest <= 1000 + len(SEPARATOR) + 1
