"""The command line: one subcommand a capability. Everything heavy is imported by the subcommand that needs it."""

import argparse
import contextlib
import importlib.metadata
import os
import signal
import sys
import threading

import wrapt

from cocomix.core.errors import CocomixError

EXIT_BAD_INPUT = 2
_GOES_ON = {
    "train": "; with --resume it goes on from its last checkpoint",
    "data": "; the same command starts again",
    "eval": "; with --tasks the same command goes on from what is complete",
    **dict.fromkeys(("sae", "labels"), "; the same command goes on from what is complete"),
}
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE ends


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for input that the user can mend, 75 for an interrupted
    training run that was saved, 130 for any other interrupt."""
    options = _parse(arguments)
    # Its bars for loading and saving models: at every checkpoint they would break up the training's own.
    wrapt.when_imported("transformers.utils.logging")(lambda logging: logging.disable_progress_bar())
    try:
        with _terminated_like_interrupted():
            code = options.run(options) or 0
            sys.stdout.flush()
            return code
    except CocomixError as error:
        print(f"cocomix {options.command}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # as in `cocomix plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"cocomix {options.command}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"\ncocomix {options.command}: interrupted{_GOES_ON.get(options.command, '')}", file=sys.stderr)
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
        prog="cocomix",
        description="Pretrain language models with continuous concepts (CoCoMix, arXiv 2502.08524).",
        epilog="CONFIG is a YAML file; KEY.SUB=VALUE arguments override its settings. See configs/ for examples.",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    parser.add_argument("--version", action="version", version=importlib.metadata.version("cocomix"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_config_command(commands, "data", _data, "turn text into a tokenizer and token files")
    train = _add_config_command(commands, "train", _train, "pretrain a student (model.mixing=none: the NTP baseline)")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the batch after the newest checkpoint, or start where there is none",
    )
    _add_config_command(commands, "sae", _sae, "train a TopK sparse autoencoder on a block of the teacher")
    _add_config_command(
        commands, "labels", _labels, "compute the cache of concept labels, or of soft targets; goes on where it stopped"
    )
    _add_plan(commands)
    _add_profile(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_generate(commands)
    _add_concepts(commands)
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


def _add_report(commands):
    report = commands.add_parser("report", help="compare runs and show measurements: a table, and a page with figures")
    report.add_argument("runs", nargs="*", metavar="RUN", help="folders of training runs")
    report.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="FILE",
        help="show what `cocomix profile --json FILE` measured; may be given several times",
    )
    report.add_argument("--bench", metavar="FILE", help="show the benchmarks of `make bench`")
    report.add_argument(
        "--bench-before",
        metavar="FILE",
        help="compare them with an older file; what became slower beyond the noise is named",
    )
    report.add_argument("--out", default="report", help="folder for report.html and its figures (default: report)")
    report.set_defaults(run=_report)


def _add_eval(commands):
    evaluate = commands.add_parser(
        "eval",
        help="perplexity of checkpoints on token files or texts, or tasks of lm-evaluation-harness",
        description="Compare checkpoints by their validation perplexity on token files (the default), by their rolling "
        "perplexity on texts (--text), or by tasks of lm-evaluation-harness (--tasks).",
    )
    evaluate.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a transformers folder, a checkpoint, or the folder of a run",
    )
    evaluate.add_argument("--batch", type=int, default=8, help="sequences in one forward pass (default: 8)")
    evaluate.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens in a window of token files or texts (default: the model's context length)",
    )
    files = evaluate.add_argument_group("token files")
    files.add_argument("--data", metavar="FOLDER", help="default: the one that the run was trained on")
    files.add_argument("--windows", type=int, metavar="N", help="windows to read (default: all)")
    texts = evaluate.add_argument_group(
        "texts",
        "Every token of each document is predicted once, in windows side by side, as lm-evaluation-harness "
        "does for WikiText: perplexity by token, by word and by byte, over all texts together.",
    )
    texts.add_argument(
        "--text",
        action="append",
        metavar="PATH",
        help="a text file, a folder, or whatever data.text takes; may be given several times",
    )
    texts.add_argument("--text-key", metavar="KEY", help="field of JSONL, column of Parquet (default: text)")
    texts.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="overlapping windows, of which only the last N predictions count, so that these see more "
        "text before them (default: windows do not overlap)",
    )
    tasks = evaluate.add_argument_group("lm-evaluation-harness")
    tasks.add_argument("--tasks", metavar="NAME[,NAME...]", help="for example lambada_openai,wikitext,hellaswag,piqa")
    tasks.add_argument("--task-folder", metavar="FOLDER", help="with tasks of your own, in the harness's YAML files")
    tasks.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's own)")
    tasks.add_argument("--limit", type=_positive, metavar="N", help="documents of a task (default: all)")
    tasks.add_argument("--out", metavar="FOLDER", help="for the results (default: in the run, or beside the model)")
    evaluate.set_defaults(run=_eval)


def _add_plan(commands):
    plan = _add_config_command(commands, "plan", _plan, "predict memory, speed and days on a cluster")
    plan.add_argument(
        "--gpus",
        required=True,
        metavar="N[,N...]",
        help="how many GPUs; for several numbers a table with a row for each",
    )
    plan.add_argument(
        "--cluster", default="h100", help="a name in configs/clusters or a YAML file like those (default: h100)"
    )
    plan.add_argument("--vocab-size", type=int, help="where there are no token files yet to tell")
    plan.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def _add_profile(commands):
    profile = _add_config_command(commands, "profile", _profile, "measure what concepts cost against NTP, part by part")
    profile.add_argument(
        "--labels",
        choices=("cached", "online", "both"),
        help="where labels or soft targets come from (default: both, or cached without a teacher)",
    )
    profile.add_argument("--mixing", choices=("interleave", "add", "predict", "pause"), help="in place of model.mixing")
    profile.add_argument(
        "--random-teacher", action="store_true", help="online labels by a GPT-2 124M and an SAE of random weights"
    )
    profile.add_argument("--vocab-size", type=int, help="take random tokens of so many ids, and no token files")
    profile.add_argument(
        "--against",
        action="append",
        default=[],
        choices=("public", "transformers"),
        help="also the public code's way, or GPT-2 of transformers for NTP; from a checkout only",
    )
    profile.add_argument("--rounds", type=_positive, help="of all modes in turn (default: 5 on a CPU, 10 on a GPU)")
    profile.add_argument("--steps", type=_positive, help="of a mode in a round (default: 1 on a CPU, 5 on a GPU)")
    profile.add_argument("--accumulation", type=_positive, default=1, help="micro batches in a step (default: 1)")
    profile.add_argument("--fit", action="store_true", help="halve train.micro_batch until it fits into memory")
    profile.add_argument("--no-breakdown", action="store_true", help="total times alone")
    profile.add_argument("--trace", metavar="FOLDER", help="write a profiler trace of each mode, for Perfetto")
    profile.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def _add_generate(commands):
    generate = commands.add_parser(
        "generate",
        help="continue a text, with concepts amplified, set or forced",
        description="Continue a text, with concepts amplified, set or forced.",
        epilog="--steer, at every token and before the TopK: ID=F or ID=xF multiplies the logit of concept ID by F; "
        "ID=set:F sets it; ID=force keeps the concept among the k whatever its logit, ID=force:F with the logit "
        "F. For example --steer 4217=3.0 --steer 88=0 --steer 7=force. ID may be a name that `cocomix concepts "
        "--name` gave.",
    )
    generate.add_argument("model", metavar="MODEL", help="a transformers folder, a checkpoint, or the folder of a run")
    generate.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="may be given several times, which makes a batch; empty: a new document",
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: 64")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this share (default: 1)")
    generate.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    generate.add_argument("--beams", type=_positive, default=1, metavar="N", help="of a beam search (default: 1, none)")
    generate.add_argument(
        "--steer",
        action="append",
        default=[],
        metavar="ID=F",
        help="change a concept, see below; may be given several times",
    )
    generate.add_argument(
        "--compare",
        action="store_true",
        help="unsteered and steered side by side, with the tokens that gain and lose probability",
    )
    generate.add_argument(
        "--teacher", action="store_true", help="with --compare: the same on the teacher, by steering its SAE"
    )
    _add_teacher_config(generate)
    generate.set_defaults(run=_generate)


def _add_concepts(commands):
    concepts = commands.add_parser(
        "concepts",
        help="which concepts a model predicts in a text and mixes in, and what they do",
        description="Which concepts a model predicts in a text, and what they do: a table, and a page to look at.",
    )
    concepts.add_argument("model", metavar="MODEL", help="a transformers folder, a checkpoint, or the folder of a run")
    concepts.add_argument("text_file", nargs="?", metavar="TEXTFILE", help="a text to read concepts from")
    concepts.add_argument("--text", help="the text itself, in place of a file")
    concepts.add_argument(
        "--concept",
        action="append",
        default=[],
        metavar="ID",
        help="look at this concept (or name) too, whatever the text; may be given several times",
    )
    concepts.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="ID=NAME",
        help="give a concept a name, kept in concept_names.json beside the model (ID=: forget it)",
    )
    concepts.add_argument(
        "--corpus",
        metavar="PATH",
        help="where to look for contexts: token files, a text file, a folder, or whatever data.text "
        "takes (default: the validation part of the run's token files)",
    )
    concepts.add_argument("--corpus-tokens", type=_positive, default=100_000, metavar="N", help="default: 100,000")
    concepts.add_argument(
        "--max-tokens",
        type=_positive,
        default=1024,
        metavar="N",
        help="of the text that are read and shown (default: 1,024)",
    )
    concepts.add_argument("--out", default="concepts.html", metavar="FILE", help="the page (default: concepts.html)")
    concepts.add_argument("--per-token", action="store_true", help="print the concepts of each token too")
    _add_teacher_config(concepts)
    concepts.set_defaults(run=_concepts)


def _add_teacher_config(parser):
    parser.add_argument(
        "--teacher-config",
        metavar="CONFIG",
        help="a config whose teacher: section names teacher and SAE (default: that of the run)",
    )


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _config(options):
    from cocomix.core.config import load_config

    return load_config(options.config, options.overrides)


def _data(options):
    from cocomix.data.preparation import prepare

    prepare(_config(options).data)


def _train(options):
    from cocomix.costs.memory_check import memory_warning
    from cocomix.training.trainer import train

    return train(_config(options), resume=options.resume, memory_warning=memory_warning)


def _sae(options):
    from cocomix.teacher.sae_training import run

    run(_config(options))


def _labels(options):
    from cocomix.teacher.extraction import run

    run(_config(options))


def _plan(options):
    from cocomix.costs.plan_text import run

    try:
        gpus = [int(number) for number in options.gpus.split(",")]
    except ValueError:
        raise CocomixError(f"--gpus {options.gpus}: expected a number, or several with commas between them") from None
    run(_config(options), gpus, options.cluster, options.vocab_size, options.json)


def _profile(options):
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its profiler warns of what was allocated before it began
    from cocomix.costs.profile_session import Options
    from cocomix.costs.profiler import run

    if options.mixing:
        options.overrides.append(f"model.mixing={options.mixing}")
    labels = {None: None, "both": ("cached", "online")}.get(options.labels, (options.labels,))
    run(
        _config(options),
        Options(
            labels=labels,
            against=tuple(options.against),
            rounds=options.rounds,
            steps=options.steps,
            accumulation=options.accumulation,
            fit=options.fit,
            random_teacher=options.random_teacher,
            vocab_size=options.vocab_size,
            breakdown=not options.no_breakdown,
        ),
        options.trace,
        options.json,
    )


def _generate(options):
    from cocomix.inference.generate import Sampling, run

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed, options.beams)
    run(
        options.model, options.prompt, sampling, options.steer, options.compare, options.teacher, options.teacher_config
    )


def _concepts(options):
    from cocomix.inference.concepts import Request, run

    run(
        options.model,
        Request(
            text_file=options.text_file,
            text=options.text,
            concepts=tuple(options.concept),
            names=tuple(options.name),
            corpus=options.corpus,
            corpus_tokens=options.corpus_tokens,
            max_tokens=options.max_tokens,
            teacher_config=options.teacher_config,
            out=options.out,
            per_token=options.per_token,
        ),
    )


def _export(options):
    from cocomix.distributed.export import export

    print(f"the model is in {export(options.checkpoint, options.out, options.dtype)}")


def _eval(options):
    _require_fitting_eval_options(options)
    if options.tasks:
        from cocomix.inference.tasks import TaskOptions, evaluate_tasks

        names = tuple(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
        evaluate_tasks(
            options.checkpoints,
            TaskOptions(names, options.task_folder, options.shots, options.limit, options.batch, options.out),
        )
        return
    if options.text:
        from cocomix.inference.rolling import RollingOptions, evaluate_texts

        evaluate_texts(
            options.checkpoints,
            RollingOptions(
                tuple(options.text), options.text_key or "text", options.seq_len, options.stride, options.batch
            ),
        )
        return
    from cocomix.inference.evaluate import evaluate_checkpoint

    for checkpoint in options.checkpoints:
        evaluate_checkpoint(checkpoint, options.data, options.seq_len, options.batch, options.windows or 0)


def _require_fitting_eval_options(options):
    """Refuse an option that the evaluation asked for would not read."""
    kind = "--tasks" if options.tasks else "--text" if options.text else None
    belongs = {
        "--data": (None,),
        "--windows": (None,),
        "--seq-len": (None, "--text"),
        "--text": ("--text",),
        "--text-key": ("--text",),
        "--stride": ("--text",),
        **dict.fromkeys(("--task-folder", "--shots", "--limit", "--out"), ("--tasks",)),
    }
    for name, kinds in belongs.items():
        if kind not in kinds and getattr(options, name[2:].replace("-", "_")) is not None:
            raise CocomixError(
                f"{name} does not go with {kind}: leave one of the two out"
                if kind
                else f"{name} goes with {kinds[0]} only"
            )


def _report(options):
    from cocomix.report.measurement_page import measured_sections
    from cocomix.report.report import comparison_table, load_run, write_report

    if not (options.runs or options.profile or options.bench):
        raise CocomixError("nothing to report: name the folder of a run, or a file with --profile or --bench")
    runs = [load_run(folder) for folder in options.runs]
    sections, text = measured_sections(options.profile, options.bench, options.bench_before)
    if runs:
        print(comparison_table(runs))
    if text:
        print(text)
    print(f"report: {write_report(runs, options.out, sections)}")


if __name__ == "__main__":
    sys.exit(main())
