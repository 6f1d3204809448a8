"""`cocomix profile`: what concepts cost on this machine."""

import os

from cocomix.commands.arguments import add_config, positive_int, read_config

SUMMARY = "measure what concepts cost against NTP, part by part"


def add_arguments(parser):
    add_config(parser, SUMMARY)
    parser.add_argument(
        "--labels",
        choices=("cached", "online", "both"),
        help="where labels or soft targets come from (default: both, or cached without a teacher)",
    )
    parser.add_argument("--mixing", choices=("interleave", "add", "predict", "pause"), help="in place of model.mixing")
    parser.add_argument(
        "--random-teacher", action="store_true", help="online labels by a GPT-2 124M and an SAE of random weights"
    )
    parser.add_argument("--vocab-size", type=int, help="take random tokens of so many ids, and no token files")
    parser.add_argument("--rounds", type=positive_int, help="of all methods in turn (default: 5 on a CPU, 10 on a GPU)")
    parser.add_argument("--steps", type=positive_int, help="of a method in a round (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument("--accumulation", type=positive_int, default=1, help="micro batches in a step (default: 1)")
    parser.add_argument("--fit", action="store_true", help="halve train.micro_batch until it fits into memory")
    parser.add_argument("--no-breakdown", action="store_true", help="total times alone")
    parser.add_argument("--trace", metavar="FOLDER", help="write a profiler trace of each method, for Perfetto")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options, against=(), peers=None):
    """Measure; a program in benchmarks/ hands in the competitors that it knows, see `Options`."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its profiler warns of what was allocated before it began
    from cocomix.costs import profiler
    from cocomix.costs.profile_session import Options

    if options.mixing:
        options.overrides.append(f"model.mixing={options.mixing}")
    labels = {None: None, "both": ("cached", "online")}.get(options.labels, (options.labels,))
    profiler.run(
        read_config(options),
        Options(
            labels=labels,
            against=tuple(against),
            peers=peers,
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
