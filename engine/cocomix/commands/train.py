"""`cocomix train`: pretraining, with or without concepts."""

from pathlib import Path

from cocomix.commands.arguments import add_config, read_config
from cocomix.core.threads import wait_passively_on_busy_cores

SUMMARY = "pretrain a student (model.mixing=none: the NTP baseline)"
WHEN_INTERRUPTED = "with --resume it continues from its last checkpoint"
OUTLIVES_ITS_OUTPUT = True


def add_arguments(parser):
    add_config(parser, SUMMARY)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the batch after the newest checkpoint, or start where there is none",
    )
    parser.add_argument(
        "--branch-from",
        type=Path,
        metavar="RUN",
        help="begin with a checkpoint of another run: the newest until which both have the same learning rates. With "
        "train.schedule=wsd one long run serves shorter ones, which then only have to decay (train.tokens). A run of "
        "model.mixing=none can go on with concepts",
    )


def run(options):
    config = read_config(options)
    wait_passively_on_busy_cores()
    from cocomix.costs.memory_check import memory_warning
    from cocomix.training.self_taught import train_self_taught
    from cocomix.training.trainer import train

    start = train_self_taught if config.teacher.self_taught_after else train
    return start(config, options.resume, options.branch_from, memory_warning)
