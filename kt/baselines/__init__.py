"""The baselines of the papers' tables."""

from kt.baselines import features, fixed, logits, plain

__all__ = ["features", "fixed", "logits", "plain"]
