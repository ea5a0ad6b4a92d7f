"""Observers of a phase: records, evaluation, checkpoints, progress."""

from kt.hooks.checkpoint import CheckpointHook
from kt.hooks.compile import CompileHook
from kt.hooks.evaluate import EvaluateHook, SyncBuffersHook
from kt.hooks.progress import ProgressHook
from kt.hooks.records import RecordHook

__all__ = [
    "CheckpointHook",
    "CompileHook",
    "EvaluateHook",
    "ProgressHook",
    "RecordHook",
    "SyncBuffersHook",
]
