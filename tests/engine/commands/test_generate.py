import pytest
from command_helpers import record_call

from cocomix.cli import main
from cocomix.inference.generate import Sampling


@pytest.fixture
def generated(monkeypatch):
    return record_call(monkeypatch, "cocomix.inference.generate.run")


def test_by_default_one_text_is_continued_greedily(generated):
    assert main(["generate", "run", "--prompt", "the"]) == 0
    assert generated == [("run", ["the"], Sampling(64, 0.0, 1.0, 0, 1), [], False, False, None)]


def test_options_are_handed_on(generated):
    sampling = ["--max-new-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--beams", "2"]
    steering = ["--steer", "7=force", "--steer", "8=0", "--compare", "--teacher", "--teacher-config", "c.yaml"]
    assert main(["generate", "run", "--prompt", "the", "--prompt", "", *sampling, *steering]) == 0
    assert generated == [
        ("run", ["the", ""], Sampling(5, 0.5, 0.9, 3, 2), ["7=force", "8=0"], True, True, "c.yaml"),
    ]


def test_a_prompt_is_needed(generated, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "run"])
    assert "--prompt" in capsys.readouterr().err and not generated
