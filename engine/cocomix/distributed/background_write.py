"""Tensors to a file while training continues: PyTorch's asynchronous checkpointing with safetensors as its format."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageWriter

from cocomix.core.files import atomic_path
from cocomix.distributed.ranks import Ranks
from cocomix.distributed.state_file import checksums_of, require_finite

# It says so of every file that a rank writes by itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class BackgroundWriter:
    """Writes this rank's files, one at a time, each from a copy in host memory.

    On a GPU the copy goes through pinned buffers that are kept from one file to the next, so `write` must not be
    called again before the future of the last call is done.
    """

    def __init__(self, ranks: Ranks):
        self._group = ranks.control
        pinned = ranks.device.type == "cuda"
        self._stager = (
            DefaultStager(
                StagingOptions(
                    use_pinned_memory=True,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=True,
                )
            )
            if pinned
            else None
        )

    def write(
        self,
        tensors: dict[str, torch.Tensor],
        path: Path,
        metadata: dict[str, str],
        before: Callable[[], None] = lambda: None,
    ) -> Future:
        """Copy `tensors` (any device) to host memory and return; the file at `path` appears, whole, when the future is
        done. `before` is called in the background first. `failure` says what went wrong."""
        saving = async_save(
            tensors,
            storage_writer=_SafetensorsFile(path, metadata, before),
            async_stager=self._stager,
            process_group=self._group,
            no_dist=True,
        )
        return cast(Future, saving)  # a future, without an asynchronous stager's answer


def failure(written: Future) -> BaseException | None:
    """What kept a file from being written, None where it is there; waits for the writer."""
    error = written.exception()
    if isinstance(error, CheckpointException):  # the one rank that it knows about
        [(error, _)] = error.failures.values()
    return error


class _SafetensorsFile(StorageWriter):
    """What PyTorch's `save` asks of a format; it knows one rank and one file."""

    def __init__(self, path: Path, metadata: dict[str, str], before: Callable[[], None]):
        super().__init__()
        self._path, self._metadata, self._before = path, metadata, before

    def write_data(self, plan, planner) -> torch.futures.Future:
        from safetensors.torch import save_file

        self._before()
        tensors = {item.index.fqn: cast(torch.Tensor, planner.resolve_data(item)) for item in plan.items}
        require_finite(tensors, self._path)
        with atomic_path(self._path) as aside:
            save_file(tensors, aside, metadata=self._metadata | checksums_of(tensors))
        written = torch.futures.Future()
        written.set_result([])
        return written

    def reset(self, checkpoint_id=None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None: ...

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def finish(self, metadata, results) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True

    def storage_meta(self) -> None:
        return None
