"""Names of concepts: where they are kept, and which are refused."""

import json
import shutil

import pytest
from run_helpers import SEQ_LEN
from usable_helpers import world_of_runs

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.inference.concept_names import add_names, read_names


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of_runs(tmp_path_factory.mktemp("world"))


def test_names_given_to_an_unfinished_run_stay_when_it_goes_on_and_ends(world, tmp_path, capsys):
    assert world.train("named", f"train.tokens={4 * 8 * SEQ_LEN}") == 0
    capsys.readouterr()
    run = world.folder / "named"
    shutil.move(run / "model", tmp_path / "model")  # as it was before its end
    text = [str(world.folder / "text/00.txt"), "--max-tokens", "8", "--out", str(tmp_path / "page.html")]
    assert main(["concepts", str(run), *text, "--name", "5=the end"]) == 0
    assert read_names(run) == {5: "the end"}
    shutil.move(tmp_path / "model", run / "model")
    assert main(["concepts", str(run), *text, "--name", "7=a start"]) == 0
    assert read_names(run) == {5: "the end", 7: "a start"} and not (run / "model/concept_names.json").exists()


def test_names_are_kept_beside_the_model_and_can_be_changed_and_forgotten(tmp_path):
    assert read_names(tmp_path) == {}
    assert add_names(tmp_path, ["12=quotes", " 3 = of  a list "], 40) == {3: "of a list", 12: "quotes"}
    assert json.loads((tmp_path / "concept_names.json").read_text()) == {"3": "of a list", "12": "quotes"}
    assert add_names(tmp_path, ["12=", "3=lists"], 40) == read_names(tmp_path) == {3: "lists"}
    for text, message in (
        ("40=x", "concepts 0 to 39"),
        ("x=y", "expected ID=NAME"),
        ("7", "expected ID=NAME"),
        ("7=lists", "concept 3 has this name already"),
        ("7=8", "cannot be a number"),
    ):
        with pytest.raises(CocomixError, match=message):
            add_names(tmp_path, [text], 40)
    assert read_names(tmp_path) == {3: "lists"}
