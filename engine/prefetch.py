"""The micro batches of a step with their labels, those of the next step made while this one trains."""

import contextlib
from collections.abc import Callable, Iterator

import torch


class StepBatches:
    """The micro batches of one optimizer step after the other, on the device, with their labels.

    The concept loss is divided by the labelled tokens of the whole global batch, so a step cannot begin before all its
    micro batches have labels. On a GPU `prefetch` therefore makes those of the next step, one at each call, on a
    stream of their own: reading, copying and labelling run beside the training of this step. Ahead of training are at
    most `rounds` micro batches, int64 tokens and labels, 8 (1 + K) bytes a token, and what the teacher needs for one
    pass: memory of another stream cannot be shared with training. On a CPU nothing is made ahead.

    `batches` yields dicts of host tensors (pinned for a GPU), `rounds` of them a step; `add_labels` puts
    `concept_labels` into one that is on the device.
    """

    def __init__(self, batches: Iterator[dict], rounds: int, add_labels: Callable[[dict], None], device: torch.device):
        self._batches, self._rounds, self._add_labels, self._device = batches, rounds, add_labels, device
        self._ahead, self._stream = [], None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which may still be loading the teacher

    def next_step(self) -> list[dict]:
        """All micro batches of the next step, ready for the current stream. Raises `StopIteration` after the last."""
        while len(self._ahead) < self._rounds:
            self._make_one()
        step, self._ahead = self._ahead, []
        return [self._hand_over(batch, made) for batch, made in step]

    def prefetch(self) -> None:
        """Make one micro batch of the next step; to be called when the forward and backward pass of each micro batch
        of this step have been launched."""
        if self._stream is not None and len(self._ahead) < self._rounds:
            with contextlib.suppress(StopIteration):  # this step is the last
                self._make_one()

    def _make_one(self) -> None:
        batch = next(self._batches)
        if self._stream is None:
            self._ahead.append((self._prepared(batch), None))
            return
        with torch.cuda.stream(self._stream):
            self._ahead.append((self._prepared(batch), self._stream.record_event()))

    def _prepared(self, batch):
        batch = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        self._add_labels(batch)
        return batch

    def _hand_over(self, batch, made):
        if made is not None:
            training = torch.cuda.current_stream(self._device)
            training.wait_event(made)
            for tensor in batch.values():
                tensor.record_stream(training)  # or its memory would be given away while training still reads it
        return batch
