import pytest
from command_helpers import assert_refused, call, record_call


def test_it_fills_the_caches_of_the_config(world, monkeypatch):
    calls = record_call(monkeypatch, "cocomix.teacher.extraction.run")
    assert call(world, "labels", "concept_labels.cache=somewhere") == 0
    assert calls == [(world.load("concept_labels.cache=somewhere"),)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "concept_labels.cache is not set"),
        (["concept_labels.cache=OUT/new", "teacher.sae=OUT/sae-wide"], "it was trained on another model"),
        (["concept_labels.cache=OUT/new", "teacher.model=OUT/nobody"], "cannot load"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(world, capsys, overrides, message):
    assert_refused(world, capsys, "labels", overrides, message)
