"""`cocomix eval`: checkpoints compared in one of three ways, on token files, on texts, or by tasks."""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from cocomix.commands.arguments import positive_int
from cocomix.core.errors import CocomixError

SUMMARY = "perplexity of checkpoints on token files or texts, or tasks of lm-evaluation-harness"
WHEN_INTERRUPTED = "with --tasks the same command continues from what is complete"


def add_arguments(parser):
    parser.description = (
        "Compare checkpoints by their validation perplexity on token files (the default), by their rolling "
        "perplexity on texts (--text), or by tasks of lm-evaluation-harness (--tasks)."
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a transformers folder, a checkpoint, or the folder of a run",
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences in one forward pass (default: 8)")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens in a window of token files or texts (default: the model's context length)",
    )
    _add_token_files(parser.add_argument_group("token files"))
    _add_texts(
        parser.add_argument_group(
            "texts",
            "Every token of each document is predicted once, in windows side by side, as lm-evaluation-harness "
            "does for WikiText: perplexity by token, by word and by byte, over all texts together.",
        )
    )
    _add_tasks(parser.add_argument_group("lm-evaluation-harness"))


def _add_token_files(group):
    group.add_argument("--data", metavar="FOLDER", help="default: the one that the run was trained on")
    group.add_argument("--windows", type=int, metavar="N", help="windows to read (default: all)")


def _add_texts(group):
    group.add_argument(
        "--text",
        action="append",
        metavar="PATH",
        help="a text file, a folder, or whatever data.text takes; may be given several times",
    )
    group.add_argument("--text-key", metavar="KEY", help="field of JSON, column of tables (default: text)")
    group.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="overlapping windows, of which only the last N predictions count, so that these see more "
        "text before them (default: windows do not overlap)",
    )


def _add_tasks(group):
    group.add_argument("--tasks", metavar="NAME[,NAME...]", help="for example lambada_openai,wikitext,hellaswag,piqa")
    group.add_argument("--task-folder", metavar="FOLDER", help="with tasks of your own, in the harness's YAML files")
    group.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's own)")
    group.add_argument("--limit", type=positive_int, metavar="N", help="documents of a task (default: all)")
    group.add_argument("--out", metavar="FOLDER", help="for the results (default: in the run, or beside the model)")


def run(options):
    way = TASKS if options.tasks else TEXTS if options.text else TOKEN_FILES
    _require_fitting_options(way, options)
    way.evaluate(options)


def _evaluate_token_files(options):
    from cocomix.inference.evaluate import evaluate_checkpoint

    for checkpoint in options.checkpoints:
        evaluate_checkpoint(checkpoint, options.data, options.seq_len, options.batch, options.windows or 0)


def _evaluate_texts(options):
    from cocomix.inference.rolling import RollingOptions, evaluate_texts

    text_key = options.text_key or "text"
    evaluate_texts(
        options.checkpoints,
        RollingOptions(tuple(options.text), text_key, options.seq_len, options.stride, options.batch),
    )


def _evaluate_tasks(options):
    from cocomix.inference.tasks import TaskOptions, evaluate_tasks

    names = tuple(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    evaluate_tasks(
        options.checkpoints,
        TaskOptions(names, options.task_folder, options.shots, options.limit, options.batch, options.out),
    )


class Way(NamedTuple):
    """One of the ways to evaluate."""

    asked_by: str | None  # the option that asks for it; None: the default
    takes: tuple[str, ...]  # options, beside --batch, which all ways take
    evaluate: Callable[[Namespace], None]


TOKEN_FILES = Way(None, ("--data", "--windows", "--seq-len"), _evaluate_token_files)
TEXTS = Way("--text", ("--text", "--text-key", "--stride", "--seq-len"), _evaluate_texts)
TASKS = Way("--tasks", ("--tasks", "--task-folder", "--shots", "--limit", "--out"), _evaluate_tasks)


def _require_fitting_options(way, options):
    """Refuse an option that `way` would not read."""
    values = {
        "--data": options.data,
        "--windows": options.windows,
        "--seq-len": options.seq_len,
        "--text": options.text,
        "--text-key": options.text_key,
        "--stride": options.stride,
        "--task-folder": options.task_folder,
        "--shots": options.shots,
        "--limit": options.limit,
        "--out": options.out,
    }
    for name, value in values.items():
        if value is None or name in way.takes:
            continue
        if way.asked_by:
            raise CocomixError(f"{name} does not go with {way.asked_by}: leave one of the two out")
        other = TEXTS if name in TEXTS.takes else TASKS
        raise CocomixError(f"{name} goes with {other.asked_by} only")
