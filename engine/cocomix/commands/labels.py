"""`cocomix labels`: what the teacher says of every token, computed once and kept."""

from cocomix.commands.arguments import add_config, read_config

SUMMARY = "compute the cache of concept labels, or of soft targets; continues where it stopped"
WHEN_INTERRUPTED = "the same command continues from what is complete"


def add_arguments(parser):
    add_config(parser, SUMMARY)


def run(options):
    from cocomix.teacher import extraction

    extraction.run(read_config(options))
