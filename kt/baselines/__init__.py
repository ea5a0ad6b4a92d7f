"""The baselines of the papers' tables."""

from kt.baselines import features, logits, plain

__all__ = ["features", "logits", "plain"]
