"""The algorithms and baselines, one file each: `kt.methods.find_method` imports `kt.methods.<name>`."""

from kt.methods.base import METHODS, Method, build_method, find_method, pair_stages

__all__ = ["METHODS", "Method", "build_method", "find_method", "pair_stages"]
