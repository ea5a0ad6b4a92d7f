"""The algorithms, one file each."""

from kt.methods import hybrid_forward, kcd, stagewise
from kt.methods.base import METHODS, Method, build_method, find_method, pair_stages

__all__ = [
    "METHODS",
    "Method",
    "build_method",
    "find_method",
    "hybrid_forward",
    "kcd",
    "pair_stages",
    "stagewise",
]
