"""`cocomix data`: text becomes a tokenizer and token files."""

from cocomix.commands.arguments import add_config, read_config

SUMMARY = "turn text into a tokenizer and token files"
WHEN_INTERRUPTED = "the same command starts again"


def add_arguments(parser):
    add_config(parser, SUMMARY)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the finished token files through and compare them with what was recorded when they were made",
    )


def run(options):
    from cocomix.data import preparation

    config = read_config(options).data
    if options.verify:
        preparation.verify(config)
    else:
        preparation.prepare(config)
