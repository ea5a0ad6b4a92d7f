"""The algorithms, one file each."""

from kt.methods import hybrid_forward, stagewise
from kt.methods.base import METHODS, Method, build_method, pair_stages

__all__ = ["METHODS", "Method", "build_method", "hybrid_forward", "pair_stages", "stagewise"]
