"""The papers' tables: printed numbers, our results beside them, verdicts on the claims, renderings."""

from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"  # the choices of the command line
