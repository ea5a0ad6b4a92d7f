"""KD's training step as torchdistill runs it, beside which `python -m experiments.bench` times ours."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch

from experiments.benched import make_model
from kt.phase import Batch
from kt.settings import METHODS, defaults

PEER = "kd"  # the method that both have
EXTRA = "pip install -e '.[bench]'"
OPTIMIZER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def torchdistill_step(arguments: argparse.Namespace, batch: Batch) -> Callable[[], float] | None:
    """One step of its own training box, on copies of the networks that ours has, in torch's own memory format.

    The box is configured as torchdistill's YAML files do, with its hooks, its criterion and the optimizer that it
    builds; what its example script does with a batch beside that is here as well.

    Args:
        arguments: The bench's.
        batch: Images and labels of a step.

    Returns:
        What takes a step and gives its loss; None where torchdistill is not installed.
    """
    try:
        from torchdistill.core.distillation import DistillationBox
    except ImportError:
        return None
    device = torch.device(arguments.device)
    ours, settings = make_model(PEER, arguments), defaults(METHODS[PEER])
    networks = [copy.deepcopy(part.network).to(device) for part in (ours.teacher, ours.student)]
    read = {f"{who}_module_path": "." for who in ("student", "teacher")}
    read |= {f"{who}_module_io": "output" for who in ("student", "teacher")}
    # Its alpha weights the cross-entropy, beta the soft targets.
    weights = {"alpha": settings["task_weight"], "beta": settings["alpha"], "temperature": settings["temperature"]}
    criterion = {"key": "KDLoss", "kwargs": {**read, **weights, "reduction": "batchmean"}}
    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"requires_grad": True, "forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(OPTIMIZER)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {PEER: {"criterion": criterion, "weight": 1.0}}},
        },
    }
    box = DistillationBox(*networks, {}, config, device, [], False, 1)
    networks[0].eval()
    networks[1].train()
    # The box holds the bare networks, which see normalised images.
    images = ours.student.normalise(batch["inputs"].cpu()).contiguous().to(device)

    def step() -> float:
        loss = box.forward_process(images, batch["labels"], None)
        box.post_forward_process(loss)
        return loss.item()

    return step
