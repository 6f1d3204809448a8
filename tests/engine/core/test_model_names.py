"""Which names reach the hub, and which are folders."""

import pytest

from cocomix.core.errors import CocomixError
from cocomix.core.model_names import as_transformers_names_it, first_line, without_prefix


def test_a_folder_is_itself_and_the_hub_is_written_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/teacher").mkdir(parents=True)
    assert as_transformers_names_it("runs/teacher") == "runs/teacher"
    assert as_transformers_names_it(tmp_path / "runs") == str(tmp_path / "runs")
    assert as_transformers_names_it("hf:openai-community/gpt2") == "openai-community/gpt2"
    assert without_prefix("hf:gpt2") == without_prefix("gpt2") == "gpt2"


@pytest.mark.parametrize("name", ["runs/teacher", "gpt2", "openai-community/gpt2"])
def test_a_name_that_could_be_either_is_refused_with_how_to_write_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CocomixError, match=f"no folder {name}; for what has this name on the .* hub write hf:{name}"):
        as_transformers_names_it(name)


@pytest.mark.parametrize("name", ["/nowhere/model", "../model", "a/b/c", "a b", "https://x.y/z"])
def test_other_names_are_folders_that_are_not_there(name):
    with pytest.raises(CocomixError) as error:
        as_transformers_names_it(name)
    assert str(error.value) == f"there is no folder {name}"


def test_an_error_is_its_first_line_or_what_it_means():
    assert first_line(ValueError("\n\none\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
    assert "no code from a model's folder is" in first_line(ValueError("x requires\npass trust_remote_code=True"))
