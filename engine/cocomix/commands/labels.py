"""`cocomix labels`: what the teacher says of every token, computed once and kept."""

from cocomix.commands.arguments import add_config, read_config
from cocomix.core.threads import wait_passively_on_busy_cores

SUMMARY = "compute the cache of concept labels, or of soft targets; continues where it stopped"
WHEN_INTERRUPTED = "the same command continues from what is complete"
OUTLIVES_ITS_OUTPUT = True


def add_arguments(parser):
    add_config(parser, SUMMARY)


def run(options):
    config = read_config(options)
    wait_passively_on_busy_cores()
    from cocomix.teacher import extraction

    extraction.run(config)
