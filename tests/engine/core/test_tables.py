"""Tables of text for the terminal."""

from cocomix.core.tables import text_table


def test_the_first_column_is_left_aligned_and_the_others_right_aligned():
    assert text_table(["run", "loss"], [["a", "3.25"], ["longer", "10.5"]]) == (
        "run     loss\n------  ----\na       3.25\nlonger  10.5"
    )


def test_columns_can_be_aligned_by_letters():
    assert text_table(["n", "name"], [["10", "x"]], "rl") == " n  name\n--  ----\n10  x   "
