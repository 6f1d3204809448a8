"""The subcommands of `cocomix`, one file each, listed in `cocomix.cli`. Every file has

- SUMMARY, one line for `cocomix --help`;
- add_arguments(parser), which adds the command's arguments to its argparse parser;
- run(options), which does the work and returns the exit code, or None for 0;
- where there is something to say, WHEN_INTERRUPTED: what the user can do after an interrupt.

Nothing heavy is imported at the top of these files, for `cocomix --help` reads them all.
"""
