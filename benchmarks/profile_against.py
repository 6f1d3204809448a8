"""`cocomix profile` with competitors: the paper's public code's way, or transformers' GPT-2 for NTP.

    python benchmarks/profile_against.py configs/openwebtext/69m.yaml --against public --against transformers

Takes every argument of `cocomix profile`. The competitors are in `peers.py`; the package knows none of them.
"""

import argparse
import sys

import peers

from cocomix.cli import exit_code, parse_with_overrides
from cocomix.commands import profile
from cocomix.core.output import any_text_can_be_shown


def main(arguments: list[str] | None = None) -> int:
    """Measure, and return the exit code of `cocomix profile`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    profile.add_arguments(parser)
    parser.description = __doc__
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        choices=("public", "transformers"),
        help="a competitor; may be given several times",
    )
    with any_text_can_be_shown():
        options = parse_with_overrides(parser, arguments)
        return exit_code("profile", lambda: profile.run(options, options.against, peers))


if __name__ == "__main__":
    sys.exit(main())
