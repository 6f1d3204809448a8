"""Batches made ahead on a stream of their own. No GPU is needed: fake streams record what would be ordered how."""

import types

import pytest
import torch

from cocomix.training.prefetch import StepBatches

CPU = torch.device("cpu")


def host_batches(count):
    return iter({"input_ids": torch.full((2, 3), number)} for number in range(count))


def label(batch):
    batch["concept_labels"] = batch["input_ids"][..., None] * 10


def numbers(step):
    return [int(batch["input_ids"][0, 0]) for batch in step]


def test_steps_take_the_batches_in_order_with_their_labels():
    batches = StepBatches(host_batches(6), 2, label, CPU)
    for step in range(3):
        micro_batches = batches.next_step()
        assert numbers(micro_batches) == [2 * step, 2 * step + 1]
        assert all(torch.equal(b["concept_labels"][..., 0], b["input_ids"] * 10) for b in micro_batches)
        batches.prefetch()
    with pytest.raises(StopIteration):
        batches.next_step()


def test_on_a_cpu_nothing_is_made_ahead():
    made = []
    batches = StepBatches(host_batches(4), 2, made.append, CPU)
    batches.next_step()
    batches.prefetch()
    assert len(made) == 2


def test_without_labels_to_count_micro_batches_are_made_one_by_one():
    made = []
    batches = StepBatches(host_batches(4), 2, made.append, CPU, whole_steps=False)
    for step in range(2):
        for number, batch in enumerate(batches.next_step()):
            assert len(made) == 2 * step + number + 1 and made[-1] is batch
            assert int(batch["input_ids"][0, 0]) == 2 * step + number
            batches.prefetch()
    with pytest.raises(StopIteration):
        batches.next_step()


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for stream", other.name))

    def record_event(self):
        self.log.append((self.name, "event"))
        return len(self.log) - 1

    def wait_event(self, event):
        self.log.append((self.name, "waits for event", event))

    def __enter__(self):
        self.log.append((self.name, "begins"))

    def __exit__(self, *_):
        self.log.append((self.name, "ends"))


@pytest.fixture
def gpu(monkeypatch):
    """A log of what happens on the streams "training" and "labels"; the device takes tensors and leaves them where
    they are."""
    log = []
    training = FakeStream("training", log)
    monkeypatch.setattr("torch.cuda.Stream", lambda _device: FakeStream("labels", log))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _device: training)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *_, non_blocking: log.append(("copy", non_blocking)) or tensor
    )
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(("used by", stream.name, tuple(tensor.shape)))
    )
    return types.SimpleNamespace(log=log, device=torch.device("cuda", 0))


def labelling(log):
    def add(batch):
        log.append(("label", int(batch["input_ids"][0, 0])))
        label(batch)

    return add


def test_a_micro_batch_is_made_on_the_side_and_training_waits_for_it(gpu):
    batches = StepBatches(host_batches(1), 1, labelling(gpu.log), gpu.device)
    [batch] = batches.next_step()
    event = gpu.log.index(("labels", "event"))
    assert gpu.log == [
        ("labels", "waits for stream", "training"),
        ("labels", "begins"),
        ("copy", True),
        ("label", 0),
        ("labels", "event"),
        ("labels", "ends"),
        ("training", "waits for event", event),
        ("used by", "training", (2, 3)),
        ("used by", "training", (2, 3, 1)),
    ]
    assert torch.equal(batch["concept_labels"], batch["input_ids"][..., None] * 10)


def test_the_next_steps_labels_are_made_while_this_one_trains_and_waited_for_one_by_one(gpu):
    batches = StepBatches(host_batches(6), 2, labelling(gpu.log), gpu.device)
    order = []
    for _ in range(3):
        step = numbers(batches.next_step())
        for number in step:
            order.append(f"train {number}")
            before = len(gpu.log)
            batches.prefetch()
            order += [f"label {entry[1]}" for entry in gpu.log[before:] if entry[0] == "label"]
    assert order == [
        "train 0",
        "label 2",
        "train 1",
        "label 3",
        "train 2",
        "label 4",
        "train 3",
        "label 5",
        "train 4",
        "train 5",
    ]
    events = [index for index, entry in enumerate(gpu.log) if entry == ("labels", "event")]
    waits = [entry[2] for entry in gpu.log if entry[:2] == ("training", "waits for event")]
    assert waits == events and len(events) == 6
    assert sum(entry[0] == "used by" for entry in gpu.log) == 12


def test_no_more_than_one_step_is_ever_ahead(gpu):
    batches = StepBatches(host_batches(9), 2, labelling(gpu.log), gpu.device)
    batches.next_step()
    for _ in range(5):
        batches.prefetch()
    assert sum(entry[0] == "label" for entry in gpu.log) == 4
    assert numbers(batches.next_step()) == [2, 3]
    assert sum(entry[0] == "label" for entry in gpu.log) == 4
    assert numbers(batches.next_step()) == [4, 5]  # what was not made ahead is made now


def test_without_labels_to_count_no_more_than_the_next_micro_batch_is_made_ahead(gpu):
    batches = StepBatches(host_batches(4), 2, labelling(gpu.log), gpu.device, whole_steps=False)
    for step in range(2):
        for number, _ in enumerate(batches.next_step(), start=2 * step):
            batches.prefetch(), batches.prefetch()
            assert [entry[1] for entry in gpu.log if entry[0] == "label"] == list(range(min(number + 2, 4)))
