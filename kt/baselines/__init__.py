"""The baselines of the papers' tables."""

from kt.baselines import features, logits, mimicking, plain

__all__ = ["features", "logits", "mimicking", "plain"]
