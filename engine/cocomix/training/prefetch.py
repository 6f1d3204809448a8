"""The micro batches of a step with what the teacher says of them, made while the one before trains."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch


class StepBatches:
    """The micro batches of one optimizer step after the other, on the device, with what `add_labels` puts into them.

    `batches` yields dicts of host tensors (pinned for a GPU), `rounds` of them a step. The concept loss is divided by
    the labelled tokens of the whole global batch, so with concept labels a step cannot begin before all its micro
    batches have theirs: `whole_steps`. Else they are made one by one.

    On a GPU `prefetch` makes what comes next on a stream of its own, so that reading, copying and labelling run beside
    training: a micro batch at each call, those of the next step with `whole_steps`, otherwise the next one alone. So at
    most two steps' micro batches with labels are there at a time, 8 (1 + K) bytes a token each, or two micro batches
    with soft targets. What the teacher needs for a pass comes on top: memory of another stream cannot be shared with
    training. On a CPU nothing is made ahead.
    """

    def __init__(
        self,
        batches: Iterator[dict],
        rounds: int,
        add_labels: Callable[[dict], None],
        device: torch.device,
        whole_steps: bool = True,
    ):
        self._batches, self._rounds, self._add_labels, self._device = batches, rounds, add_labels, device
        self._whole_steps, self._most_ahead = whole_steps, rounds if whole_steps else 1
        self._ahead, self._stream = [], None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which may still be loading the teacher

    def next_step(self) -> Iterable[dict]:
        """The micro batches of the next step, ready for the current stream: a list with `whole_steps`, otherwise to be
        gone through once. Raises `StopIteration` after the last step."""
        while len(self._ahead) < self._most_ahead:
            self._make_one()
        if not self._whole_steps:
            return self._one_by_one()
        step, self._ahead = self._ahead, []
        return [self._hand_over(batch, made) for batch, made in step]

    def _one_by_one(self):
        for _ in range(self._rounds):
            if not self._ahead:
                self._make_one()
            yield self._hand_over(*self._ahead.pop())

    def prefetch(self) -> None:
        """Make one micro batch ahead; to be called when the forward and backward pass of each micro batch of this step
        have been launched."""
        if self._stream is not None and len(self._ahead) < self._most_ahead:
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
