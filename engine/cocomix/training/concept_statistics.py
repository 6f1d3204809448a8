"""How well a student knows its concepts: coverage of the labels, concepts in use, and agreement with the teacher."""

import torch

from cocomix.distributed.ranks import Ranks


@torch.no_grad()
def concept_statistics(model, batches, concept_dim: int, ranks: Ranks) -> dict[str, float]:
    """Statistics of labelled micro batches, over all ranks; every rank brings equally many.

    A batch holds `input_ids` [B, T] and `concept_labels` [B, T, K] (-1: none), int64. Returns, as JSON numbers:
    `concept_tokens`, those with a concept of their own, that were looked at; `label_coverage`, the share of them with a
    label; `concept_agreement`, the share of labels that are among the student's k predicted concepts; `label_concepts`
    and `predicted_concepts`, how many of the `concept_dim` occur in labels and in predictions; `concept_loss`, the mean
    over labelled tokens.
    """
    device = ranks.device
    in_labels, in_predictions = torch.zeros(concept_dim, device=device), torch.zeros(concept_dim, device=device)
    sums = torch.zeros(5, dtype=torch.float64)  # tokens, those with a label, labels, labels found, concept loss
    was_training = model.training
    model.eval()
    for batch in batches:
        ids, labels = batch["input_ids"], batch["concept_labels"]
        out = model(input_ids=ids, labels=ids, concept_labels=labels, use_cache=False)
        labels = labels[:, model.config.concept_tokens]
        present = labels >= 0
        labelled = present.any(-1).sum().item()
        found = (labels.unsqueeze(-1) == out.concept_indices.unsqueeze(-2)).any(-1) & present
        n_tokens, loss = present.shape[:2].numel(), out.concept_loss.item()
        counts = [n_tokens, labelled, present.sum().item(), found.sum().item(), loss * labelled]
        sums += torch.tensor(counts, dtype=torch.float64)
        in_labels[labels[present]] = 1
        in_predictions[out.concept_indices.flatten()] = 1
    model.train(was_training)
    tokens, labelled, labels, found, loss = ranks.sum(sums.to(device)).tolist()
    return {
        "concept_tokens": int(tokens),
        "label_coverage": labelled / tokens,
        "concept_agreement": found / max(labels, 1),
        "label_concepts": int((ranks.sum(in_labels) > 0).sum()),
        "predicted_concepts": int((ranks.sum(in_predictions) > 0).sum()),
        "concept_loss": loss / max(labelled, 1),
    }
