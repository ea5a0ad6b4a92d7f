"""Observers of a phase: records, evaluation, checkpoints, progress, Weights & Biases."""

from kt.hooks.checkpoint import CheckpointHook
from kt.hooks.evaluate import EvaluateHook, SyncBuffersHook
from kt.hooks.progress import ProgressHook
from kt.hooks.records import RecordHook
from kt.hooks.wandb import WandbRun

__all__ = [
    "CheckpointHook",
    "EvaluateHook",
    "ProgressHook",
    "RecordHook",
    "SyncBuffersHook",
    "WandbRun",
]
