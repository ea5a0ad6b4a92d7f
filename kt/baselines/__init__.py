"""The baselines of the papers' tables."""

from kt.baselines import features, fixed, logits, mimicking, plain

__all__ = ["features", "fixed", "logits", "mimicking", "plain"]
