"""`cocomix plan`: what a run would need on a cluster, without running it."""

from cocomix.commands.arguments import add_config, read_config
from cocomix.core.errors import CocomixError

SUMMARY = "predict memory, speed and days on a cluster"


def add_arguments(parser):
    add_config(parser, SUMMARY)
    parser.add_argument(
        "--gpus",
        required=True,
        metavar="N[,N...]",
        help="how many GPUs; for several numbers a table with a row for each",
    )
    parser.add_argument(
        "--cluster", default="h100", help="a name in configs/clusters or a YAML file like those (default: h100)"
    )
    parser.add_argument("--vocab-size", type=int, help="where there are no token files yet to tell")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options):
    from cocomix.costs import plan_text

    gpus = _numbers(options.gpus)
    plan_text.run(read_config(options), gpus, options.cluster, options.vocab_size, options.json)


def _numbers(text):
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise CocomixError(f"--gpus {text}: expected a number, or several with commas between them") from None
