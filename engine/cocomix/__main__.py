"""`python -m cocomix`, for launchers that start modules: torchrun and deepspeed."""

import sys

from cocomix.cli import main

if __name__ == "__main__":
    sys.exit(main())
