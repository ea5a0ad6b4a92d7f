"""Top-k accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    model: nn.Module, loader: Any, num_classes: int, outcomes: Outcomes | None = None
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent of the plain student on a whole loader, over all processes.

    The model's mode is put back afterwards; there is one device synchronisation, at the end. `outcomes`, where given,
    gets whether each image was right.
    """
    k = top_k_of(num_classes)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    counts: torch.Tensor | None = None
    kept: list[torch.Tensor] = []
    for batch in loader.epoch(0):
        logits = model(batch["inputs"], mode="predict")
        ranked = logits.topk(k, dim=1).indices.eq(batch["labels"][:, None])
        hits = torch.stack([ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(ranked), device=ranked.device)])
        counts = hits if counts is None else counts + hits
        if outcomes is not None:
            kept.append(torch.stack([batch["indices"].to(ranked.device), ranked[:, 0].long(), ranked.any(1).long()]))
    for module, mode in modes.items():
        module.training = mode
    if counts is None:
        raise ValueError("the evaluation set is empty")
    if outcomes is not None:
        indices, first, among = torch.cat(kept, dim=1).cpu().numpy()
        outcomes.images = joined({"indices": indices, "top1": first.astype(bool), "top5": among.astype(bool)})
    top1, topk, total = sum_over_ranks(counts).tolist()
    return {"top1": 100.0 * top1 / total, "top5": 100.0 * topk / total}


def describe(metrics: Mapping[str, float]) -> str:
    """`top1 63.20  top5 80.10`."""
    return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
