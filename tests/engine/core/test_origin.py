from cocomix.core.origin import Difference, differences

STORED, PRESENT = {"b": 1, "a": "x", "old": 2}, {"new": 3, "b": 1, "a": "y"}


def test_all_that_differs_is_found_and_sorted_by_name():
    found = [Difference("a", "x", "y"), Difference("new", None, 3), Difference("old", 2, None)]
    assert differences(STORED, PRESENT) == found
    assert differences(STORED, STORED) == []


def test_names_are_compared_alone_and_in_their_order():
    assert [found.name for found in differences(STORED, PRESENT, ["new", "b", "a"])] == ["new", "a"]


def test_a_difference_says_what_was_and_what_is():
    assert str(Difference("train.lr", 0.1, 0.2)) == "train.lr was 0.1 and is 0.2"
