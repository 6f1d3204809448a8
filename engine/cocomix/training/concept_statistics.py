"""How well a student knows its concepts: coverage of the labels, concepts in use, and agreement with the teacher."""

import torch

from cocomix.distributed.ranks import Ranks


@torch.no_grad()
def concept_statistics(model, batches, concept_dim: int, ranks: Ranks) -> dict[str, float]:
    """Statistics of labelled micro batches, over all ranks; every rank brings equally many.

    A batch holds `input_ids` [B, T] and `concept_labels` [B, T, K] (-1: none), int64. Returns, as JSON numbers:
    `concept_tokens` that were looked at; `label_coverage`, the share of them with a label; `concept_agreement`, the
    share of labels that are among the student's k predicted concepts; `label_concepts` and `predicted_concepts`, how
    many of the `concept_dim` occur in labels and in predictions; `concept_loss`, the mean over labelled tokens.
    """
    device = ranks.device
    labelled_by, predicted_by = (torch.zeros(concept_dim, device=device) for _ in range(2))
    sums = dict.fromkeys(("tokens", "labelled", "labels", "found", "loss"), 0.0)
    was_training = model.training
    model.eval()
    for batch in batches:
        labels = batch["concept_labels"]
        out = model(input_ids=batch["input_ids"], labels=batch["input_ids"], concept_labels=labels, use_cache=False)
        present = labels >= 0
        labelled = present.any(-1).sum().item()
        found = (labels.unsqueeze(-1) == out.concept_indices.unsqueeze(-2)).any(-1) & present
        counts = (
            labels.shape[0] * labels.shape[1],
            labelled,
            present.sum().item(),
            found.sum().item(),
            out.concept_loss.item() * labelled,
        )
        sums = {name: sums[name] + count for name, count in zip(sums, counts, strict=True)}
        labelled_by[labels[present]] = 1
        predicted_by[out.concept_indices.flatten()] = 1
    model.train(was_training)
    totals = ranks.sum(torch.tensor(list(sums.values()), dtype=torch.float64, device=device)).tolist()
    tokens, labelled, labels, found, loss = totals
    return {
        "concept_tokens": int(tokens),
        "label_coverage": labelled / tokens,
        "concept_agreement": found / max(labels, 1),
        "label_concepts": int((ranks.sum(labelled_by) > 0).sum()),
        "predicted_concepts": int((ranks.sum(predicted_by) > 0).sum()),
        "concept_loss": loss / max(labelled, 1),
    }
