"""`cocomix data`: text becomes a tokenizer and token files."""

from cocomix.commands.arguments import add_config, read_config

SUMMARY = "turn text into a tokenizer and token files"
WHEN_INTERRUPTED = "the same command starts again"


def add_arguments(parser):
    add_config(parser, SUMMARY)


def run(options):
    from cocomix.data.preparation import prepare

    prepare(read_config(options).data)
