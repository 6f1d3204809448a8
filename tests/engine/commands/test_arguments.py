import argparse

import pytest

from cocomix.commands.arguments import add_config, add_teacher_config, positive_int, read_config
from cocomix.core.errors import CocomixError


def test_the_config_is_read_with_its_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {lr: 1e-3, seed: 3}")
    parser = argparse.ArgumentParser()
    add_config(parser, "do a thing")
    config = read_config(parser.parse_args([str(tmp_path / "c.yaml"), "train.lr=0.5"]))
    assert parser.description == "Do a thing."
    assert config.train.lr == 0.5 and config.train.seed == 3


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(CocomixError, match="no config file at"):
        read_config(argparse.Namespace(config=str(tmp_path / "none.yaml"), overrides=[]))


def test_the_teachers_config_may_be_left_out():
    parser = argparse.ArgumentParser()
    add_teacher_config(parser)
    assert parser.parse_args([]).teacher_config is None
    assert parser.parse_args(["--teacher-config", "c.yaml"]).teacher_config == "c.yaml"


def test_a_positive_number_is_at_least_1():
    assert positive_int("1") == 1 and positive_int("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="^0 is not at least 1$"):
        positive_int("0")
    with pytest.raises(ValueError):  # argparse makes its own message of it
        positive_int("many")
