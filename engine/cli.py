"""The command line: one subcommand a capability. Everything heavy is imported by the subcommand that needs it."""

import argparse
import contextlib
import importlib.metadata
import signal
import sys
import threading

import wrapt

from cocomix.errors import CocomixError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for input that the user can mend, 75 for an interrupted
    training run that was saved, 130 for any other interrupt."""
    options = _parse(arguments)
    # Its bars for loading and saving models: at every checkpoint they would break up the training's own.
    wrapt.when_imported("transformers.utils.logging")(lambda logging: logging.disable_progress_bar())
    try:
        with _terminated_like_interrupted():
            return options.run(options) or 0
    except CocomixError as error:
        print(f"cocomix {options.command}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.filename is None:
            raise
        print(f"cocomix {options.command}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        again = "; with --resume it goes on from its last checkpoint" if options.command == "train" else (
            "; the same command goes on from what is complete")
        print(f"\ncocomix {options.command}: interrupted{again}", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def _terminated_like_interrupted():
    """SIGTERM raises KeyboardInterrupt inside the block, so that half-written files are cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="cocomix", description="Pretrain language models with continuous concepts (CoCoMix, arXiv 2502.08524).",
        epilog="CONFIG is a YAML file; KEY.SUB=VALUE arguments override its settings. See configs/ for examples.",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    parser.add_argument("--version", action="version", version=importlib.metadata.version("cocomix"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_config_command(commands, "data", _data, "turn text into a tokenizer and token files")
    train = _add_config_command(commands, "train", _train, "pretrain a student (model.mixing=none: the NTP baseline)")
    train.add_argument("--resume", action="store_true",
                       help="go on with the batch after the newest checkpoint, or start where there is none")
    _add_config_command(commands, "sae", _sae, "train a TopK sparse autoencoder on a block of the teacher")
    _add_config_command(commands, "labels", _labels, "compute the cache of concept labels; goes on where it stopped")
    _add_plan(commands)
    evaluate = commands.add_parser("eval", help="validation perplexity of a checkpoint")
    evaluate.add_argument("checkpoint", help="a transformers folder, a checkpoint, or the folder of a run")
    evaluate.add_argument("--data", help="folder of token files (default: the one that the run was trained on)")
    evaluate.add_argument("--seq-len", type=int, help="tokens in a window (default: the model's context length)")
    evaluate.add_argument("--batch", type=int, default=8, help="windows in one forward pass (default: 8)")
    evaluate.add_argument("--windows", type=int, default=0, help="windows to read (default: all)")
    evaluate.set_defaults(run=_eval)
    report = commands.add_parser("report", help="compare runs: a table, and a page with their curves")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders of training runs")
    report.add_argument("--out", default="report", help="folder for report.html and its figures (default: report)")
    report.set_defaults(run=_report)
    export = commands.add_parser("export", help="turn a checkpoint into a transformers folder, for any use elsewhere")
    export.add_argument("checkpoint", help="a checkpoint, the folder of a run, or a transformers folder")
    export.add_argument("out", metavar="OUT", help="the folder to write; it must not exist yet")
    export.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="of the weights (default: fp32)")
    export.set_defaults(run=_export)
    options, rest = parser.parse_known_args(arguments)
    # argparse does not take more KEY=VALUE arguments after an option, so they end up in the rest
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    unknown = [text for text in rest if text not in overrides]
    if unknown or (overrides and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    if overrides:
        options.overrides += overrides
    return options


def _add_config_command(commands, name, run, summary):
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example train.lr=3e-4")
    parser.set_defaults(run=run)
    return parser


def _add_plan(commands):
    plan = _add_config_command(commands, "plan", _plan, "predict memory, speed and days on a cluster")
    plan.add_argument("--gpus", required=True, metavar="N[,N...]",
                      help="how many GPUs; for several numbers a table with a row for each")
    plan.add_argument("--cluster", default="h100",
                      help="a name in configs/clusters or a YAML file like those (default: h100)")
    plan.add_argument("--vocab-size", type=int, help="where there are no token files yet to tell")
    plan.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def _config(options):
    from cocomix.config import load_config

    return load_config(options.config, options.overrides)


def _data(options):
    from cocomix.data import prepare

    prepare(_config(options).data)


def _train(options):
    from cocomix.trainer import train

    return train(_config(options), resume=options.resume)


def _sae(options):
    from cocomix.sae_training import run

    run(_config(options))


def _labels(options):
    from cocomix.labels import run

    run(_config(options))


def _plan(options):
    from cocomix.planner import run

    try:
        gpus = [int(number) for number in options.gpus.split(",")]
    except ValueError:
        raise CocomixError(f"--gpus {options.gpus}: expected a number, or several with commas between them") from None
    run(_config(options), gpus, options.cluster, options.vocab_size, options.json)


def _export(options):
    from cocomix.export import export

    print(f"the model is in {export(options.checkpoint, options.out, options.dtype)}")


def _eval(options):
    from cocomix.evaluate import evaluate_checkpoint

    evaluate_checkpoint(options.checkpoint, options.data, options.seq_len, options.batch, options.windows)


def _report(options):
    from cocomix.report import comparison_table, load_run, write_report

    runs = [load_run(folder) for folder in options.runs]
    print(comparison_table(runs))
    print(f"report: {write_report(runs, options.out)}")


if __name__ == "__main__":
    sys.exit(main())
