"""The command line: finds the command, parses its arguments, and turns its end into an exit code."""

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import signal
import sys
import threading

import wrapt

from cocomix.core.errors import CocomixError
from cocomix.core.files import final_name
from cocomix.core.output import any_text_can_be_shown, lost_output_is_no_error, one_line
from cocomix.core.signals import handled

# In the order of `cocomix --help`; each is a module of cocomix.commands.
COMMANDS = ("data", "train", "sae", "labels", "plan", "profile", "eval", "report", "generate", "concepts", "export")

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE ends


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for input that the user can fix, 75 for an interrupted
    training run that was saved, 130 for any other interrupt."""
    with any_text_can_be_shown():
        options = _parse(arguments)
        command = _find(options.command)
        outlives = lost_output_is_no_error if getattr(command, "OUTLIVES_ITS_OUTPUT", False) else contextlib.nullcontext
        with outlives():
            return exit_code(options.command, lambda: command.run(options), getattr(command, "WHEN_INTERRUPTED", None))


def exit_code(name: str, work, when_interrupted: str | None = None) -> int:
    """Do `work()` as the command `name`: what it returns (None: 0), or the code of how it failed, said in one line."""
    # Its bars for loading and saving models: at every checkpoint they would break up the training's own.
    wrapt.when_imported("transformers.utils.logging")(lambda logging: logging.disable_progress_bar())
    try:
        with _terminated_like_interrupted():
            code = work() or 0
            if sys.stdout is not None:  # it is where it was closed before the start
                sys.stdout.flush()
            return code
    except CocomixError as error:
        _say(f"cocomix {name}: error: {one_line(error)}")
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # as in `cocomix plan ... | head`
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"cocomix {name}: error: {one_line(f'{final_name(error.filename)}: {error.strerror}')}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        _say(f"\ncocomix {name}: interrupted{f'; {when_interrupted}' if when_interrupted else ''}")
        return EXIT_INTERRUPTED


def _say(text: str) -> None:
    """Print a line on standard error in one go: other ranks may be saying theirs."""
    print(f"{text}\n", end="", file=sys.stderr)


@contextlib.contextmanager
def _terminated_like_interrupted():
    """Signals that ask to end raise KeyboardInterrupt inside the block, so that half-written files are cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled(signal.default_int_handler, but=signal.SIGINT):
        yield


def _find(name):
    """The module of a command."""
    return importlib.import_module(f"cocomix.commands.{name}")


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="cocomix",
        description="Pretrain language models with continuous concepts (CoCoMix, arXiv 2502.08524).",
        epilog="CONFIG is a YAML file; KEY.SUB=VALUE arguments override its settings. See configs/ for examples.",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    parser.add_argument("--version", action="version", version=importlib.metadata.version("cocomix"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = _find(name)
        command.add_arguments(commands.add_parser(name, help=command.SUMMARY))
    return parse_with_overrides(parser, arguments)


def parse_with_overrides(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse arguments among which KEY=VALUE may stand anywhere."""
    options, rest = parser.parse_known_args(arguments)
    # argparse does not take more KEY=VALUE arguments after an option, so they end up in the rest
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    unknown = [text for text in rest if text not in overrides]
    if unknown or (overrides and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    if overrides:
        options.overrides += overrides
    return options


if __name__ == "__main__":
    sys.exit(main())
