"""The papers' tables: printed numbers, our results beside them, verdicts on the claims, renderings."""
