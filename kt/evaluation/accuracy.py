"""Top-k accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kt.evaluation.outcomes import Outcomes, joined
from kt.ranks import sum_over_ranks


def top_k_of(num_classes: int) -> int:
    """The k that "top5" stands for: 5, shrunk to 2 where 5 of the classes would be more than a quarter of them."""
    return min(5 if num_classes >= 20 else 2, num_classes)


def metric_labels(num_classes: int) -> dict[str, str]:
    """Readable names of metrics whose meaning differs from their name."""
    k = top_k_of(num_classes)
    return {} if k == 5 else {"top5": f"top-{k} of {num_classes} classes"}


@torch.no_grad()
def evaluate_accuracy(
    model: nn.Module,
    loader: Any,
    num_classes: int,
    outcomes: Outcomes | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent of the plain student on a whole loader, over all processes.

    The model's mode is put back afterwards; there is one device synchronisation, at the end. `outcomes`, where given,
    gets the label of each image, what was found, and whether that was right; with names of classes also the accuracy of
    each class.
    """
    k = top_k_of(num_classes)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    counts: torch.Tensor | None = None
    kept: list[torch.Tensor] = []
    for batch in loader.epoch(0):
        logits = model(batch["inputs"], mode="predict")
        first = logits.topk(k, dim=1).indices
        ranked = first.eq(batch["labels"][:, None])
        hits = torch.stack([ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(ranked), device=ranked.device)])
        counts = hits if counts is None else counts + hits
        if outcomes is not None:
            own = (batch["indices"].to(ranked.device), batch["labels"], first[:, 0], ranked.any(1).long())
            kept.append(torch.stack(own))
    for module, mode in modes.items():
        module.training = mode
    if counts is None:
        raise ValueError("the evaluation set is empty")
    if outcomes is not None:
        indices, label, found, among = torch.cat(kept, dim=1).cpu().numpy()
        right = {"top1": label == found, "top5": among.astype(bool)}
        places = {"label": label.astype(np.int32), "found": found.astype(np.int32)}
        outcomes.images = joined({"indices": indices, **right, **places})
        if class_names:
            each = class_accuracy(outcomes.images["label"], outcomes.images["top1"], len(class_names))
            outcomes.classes = {"top1": dict(zip(class_names, each, strict=True))}
    top1, topk, total = sum_over_ranks(counts).tolist()
    return {"top1": 100.0 * top1 / total, "top5": 100.0 * topk / total}


def class_accuracy(label: NDArray[np.int32], right: NDArray[np.bool_], num_classes: int) -> list[float | None]:
    """Accuracy in percent of each class, None of one without images.

    Args:
        label: (n,) the classes of images.
        right: (n,) whether each was found.
        num_classes: How many classes there are.
    """
    images = np.bincount(label, minlength=num_classes)
    hits = np.bincount(label, weights=right, minlength=num_classes)
    return [100.0 * hit / count if count else None for hit, count in zip(hits.tolist(), images.tolist(), strict=True)]
