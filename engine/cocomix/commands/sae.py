"""`cocomix sae`: a sparse autoencoder for the teacher, whose latents are the concepts."""

from cocomix.commands.arguments import add_config, read_config
from cocomix.core.threads import wait_passively_on_busy_cores

SUMMARY = "train a TopK sparse autoencoder on a block of the teacher"
WHEN_INTERRUPTED = "the same command continues from what is complete"
OUTLIVES_ITS_OUTPUT = True


def add_arguments(parser):
    add_config(parser, SUMMARY)


def run(options):
    config = read_config(options)
    wait_passively_on_busy_cores()
    from cocomix.teacher import sae_training

    sae_training.run(config)
