import pytest
import torch
from model_helpers import small_model
from run_helpers import LATENTS, uneven

from cocomix.distributed.ranks import Ranks
from cocomix.training.concept_statistics import concept_statistics

CPU = Ranks(0, 1, torch.device("cpu"))


def labelled_batches(model):
    """Two batches with the concepts in their labels and those that the model predicts. Half of the windows have labels:
    at every token one that the model predicts, at every other token one that it doesn't."""
    concepts = model.config.concept_dim
    batches, labels_seen, predicted = [], set(), set()
    for seed in range(2):
        torch.manual_seed(seed)
        ids = torch.randint(0, model.config.vocab_size, (2, 6))
        with torch.no_grad():
            kept = model.eval()(ids, labels=ids).concept_indices  # [2, 6, k]
        labels = torch.full((2, 6, 2), -1)
        labels[0, :, 0] = kept[0, :, 0]  # found
        for t in range(0, 6, 2):  # not found: the first concept that is not kept
            labels[0, t, 1] = next(c for c in range(concepts) if c not in kept[0, t])
        batches.append({"input_ids": ids, "concept_labels": labels})
        labels_seen |= set(labels[labels >= 0].tolist())
        predicted |= set(kept.flatten().tolist())
    return batches, labels_seen, predicted


def test_statistics_are_those_of_a_count_by_hand():
    model = small_model()
    batches, labels_seen, predicted = labelled_batches(model)
    model.train()
    found = concept_statistics(model, batches, model.config.concept_dim, CPU)
    assert model.training
    assert found["concept_tokens"] == 24 and found["label_coverage"] == pytest.approx(0.5)
    assert found["concept_agreement"] == pytest.approx(12 / 18)
    assert found["label_concepts"] == len(labels_seen) and found["predicted_concepts"] == len(predicted)
    model.eval()
    losses = [
        model(batch["input_ids"], labels=batch["input_ids"], concept_labels=batch["concept_labels"]).concept_loss.item()
        for batch in batches
    ]
    assert found["concept_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)  # both have six labelled tokens


def test_windows_without_labels_count_as_such():
    model = small_model()
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "concept_labels": torch.full((1, 5, 2), -1)}
    found = concept_statistics(model, [batch], model.config.concept_dim, CPU)
    assert (found["label_coverage"], found["concept_agreement"], found["label_concepts"]) == (0, 0, 0)
    assert found["predicted_concepts"] > 0


def test_evaluations_of_a_run_hold_them(world):
    assert world.train("cached", *uneven(world)) == 0
    assert world.train("online", "concept_labels.cache=null") == 0
    assert world.train("ntp", "model.mixing=none") == 0
    assert all("label_coverage" not in record for record in world.records("ntp", "eval"))
    for run in ("cached", "online"):
        first, last = world.records(run, "eval")[0], world.records(run, "eval")[-1]
        assert first["concept_tokens"] == last["concept_tokens"] == 8 * 16
        assert 0 < first["label_coverage"] <= 1 and first["label_coverage"] == last["label_coverage"]
        assert 0 < last["label_concepts"] <= LATENTS and 0 < last["predicted_concepts"] <= LATENTS
        assert 0 <= last["concept_agreement"] <= 1
