"""Observers of a phase: records, evaluation, checkpoints, progress, Weights & Biases."""

from kt.hooks.checkpoint import CheckpointHook, SnapshotHook
from kt.hooks.evaluate import EvaluateHook, SyncBuffersHook
from kt.hooks.progress import ProgressHook
from kt.hooks.records import RecordHook, Records
from kt.hooks.wandb import WandbRun

__all__ = [
    "CheckpointHook",
    "EvaluateHook",
    "ProgressHook",
    "RecordHook",
    "Records",
    "SnapshotHook",
    "SyncBuffersHook",
    "WandbRun",
]
