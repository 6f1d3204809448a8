"""What was not read: counted, named, said, and how much of it is too much."""

import pytest

from cocomix.core.errors import CocomixError
from cocomix.data.left_out import BAD_RECORD, EMPTY, LeftOut, Tally, say


def test_reasons_are_counted_with_their_first_names(capsys):
    tally = Tally("corpus")
    for number in range(5):
        tally.add("image", f"{number}.png")
    tally.add("text with NULs", "a.txt: 1,234")
    assert tally.left_out() == [
        LeftOut("corpus", "image", 5, ["0.png", "1.png", "2.png"]),
        LeftOut("corpus", "text with NULs", 1, ["a.txt: 1,234"]),
    ]
    say(tally.left_out())
    assert capsys.readouterr().out == (
        "left out of corpus: 5 x image (0.png, 1.png, 2.png, ...)\n"
        "left out of corpus: 1 x text with NULs (a.txt: 1,234)\n"
    )


def test_no_text_is_an_empty_document_and_counted():
    tally = Tally("a")
    assert tally.text("text", "row 1") == [["text"]]
    assert [tally.text(text, "row") for text in (None, "", " \n")] == [[], [], []]
    assert tally.records == 4
    assert [(found.reason, found.count) for found in tally.left_out()] == [(EMPTY, 3)]


def test_a_bad_record_stops_and_says_how_to_go_on():
    with pytest.raises(CocomixError, match=r"^a.jsonl, line 3: not JSON; data.on_bad_record=skip leaves .* out$"):
        Tally("a.jsonl").bad("a.jsonl, line 3", "not JSON")


def test_skipped_records_are_counted_until_there_are_too_many():
    tally = Tally("a", skip_bad=True)
    for number in range(9):
        tally.text("text", f"line {number}")
    tally.bad("line 10", "not JSON")
    assert [(found.reason, found.count) for found in tally.left_out()] == [(BAD_RECORD, 1)]
    tally.require_few_bad(0.1)
    with pytest.raises(
        CocomixError, match=r"a: 1 of 10 records are bad, beginning with line 10: mend .* which is 0.09"
    ):
        tally.require_few_bad(0.09)
    Tally("nothing").require_few_bad(0.0)
