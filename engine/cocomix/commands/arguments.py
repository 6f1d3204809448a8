"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cocomix.core.config import Config  # loads omegaconf, which is too slow for `cocomix --help`


def add_config(parser: argparse.ArgumentParser, summary: str) -> None:
    """CONFIG and KEY=VALUE; the command's summary, as a sentence, stands above its arguments."""
    parser.description = f"{summary[0].upper()}{summary[1:]}."
    parser.add_argument("config", metavar="CONFIG", help="a YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example train.lr=3e-4")


def read_config(options: argparse.Namespace) -> Config:
    """The config that `add_config`'s arguments name. Raises `CocomixError` for one that cannot be read."""
    from cocomix.core.config import load_config

    return load_config(options.config, options.overrides)


def add_teacher_config(parser: argparse.ArgumentParser) -> None:
    """--teacher-config, for commands that take a model and can ask its teacher."""
    parser.add_argument(
        "--teacher-config",
        metavar="CONFIG",
        help="a config whose teacher: section names teacher and SAE (default: that of the run)",
    )


def positive_int(text: str) -> int:
    """A type for argparse: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
