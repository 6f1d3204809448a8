"""Run under torchrun: several command lines of cocomix, given as JSON, one after the other in one process group."""

import functools
import json
import sys
from datetime import timedelta

import torch

from cocomix.cli import main
from cocomix.distributed.ranks import import_deepspeed

# Code generation would take longer than all else together; one process does it in test_zero.py.
torch.compile = functools.partial(torch.compile, backend="aot_eager")
deepspeed = import_deepspeed()
torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=2))
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
torch.distributed.barrier()
deepspeed.comm.destroy_process_group()
