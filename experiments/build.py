"""From a cell's resolved config to a trained student: data, networks, method, and `kt.train.fit`."""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kt.baselines  # noqa: F401 - registers the baselines
from kt.classifier import Classifier
from kt.data import build_data
from kt.errors import UserError
from kt.evaluation.accuracy import evaluate_accuracy, metric_labels
from kt.hooks import WandbRun
from kt.methods import METHODS, build_method
from kt.models import build_network
from kt.phases import rank_and_world, seed_everything
from kt.stages import head_of
from kt.train import fit, images_per_second, write_json
from kt.transfer import TransferModel

logger = logging.getLogger(__name__)

# Weights are drawn from their own stream, so that every method of a seed starts from the same student.
WEIGHTS, CLASSIFIER = 1_000_003, 1_000_033


def pick_device(name: str) -> torch.device:
    """The device that `device=` names; `auto` takes this process's GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={name!r}: there is no CUDA device here; expected auto or cpu")
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r}: expected auto, cpu, cuda or cuda:<index>") from None


def load_weights(network: nn.Module, path: Path, key: str) -> None:
    """Loads a plain state dict strictly.

    Raises:
        UserError: The file is missing, is no state dict, or belongs to another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{key}={str(path)!r}: there is no such file") from None
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{key}={str(path)!r}: expected a state dict saved by torch.save ({first})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{key}={str(path)!r}: expected a state dict, the file holds something else")
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected or shapes:
        if shapes:
            name = sorted(shapes)[0]
            detail = f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        else:
            detail = f"first missing key: {(missing or ['none'])[0]}, first unexpected: {(unexpected or ['none'])[0]}"
        raise UserError(
            f"{key}={str(path)!r}: the checkpoint belongs to another network ({len(missing)} keys missing, "
            f"{len(unexpected)} unexpected, {len(shapes)} of another shape; {detail})"
        )
    network.load_state_dict(state)


def build_classifier(
    network: Mapping[str, Any], num_classes: int, image_size: int, normalisation: Any, pretrained: str | None = None
) -> Classifier:
    """A network of the config with the dataset's normalisation, or with its own where it comes pretrained."""
    settings = {key: value for key, value in network.items() if value is not None}
    plain = build_network(**settings, num_classes=num_classes, image_size=image_size, pretrained=pretrained)
    return Classifier(plain, None if pretrained else normalisation)


def build_teacher(config: Mapping[str, Any], spec: Any, path: Path | None) -> Classifier | None:
    """The teacher with its weights; its classes and normalisation are those it was trained with."""
    teacher = config["teacher"]
    if not teacher or not teacher.get("network"):
        return None
    if path is None:
        raise UserError(f"teacher={teacher['network']['name']}: it has neither a checkpoint nor a cell to take it from")
    num_classes, image_size, normalisation = spec.num_classes, spec.image_size, (spec.mean, spec.std)
    described = path.with_name("student.json")
    if described.exists():
        record = json.loads(described.read_text())
        num_classes, image_size = record["num_classes"], record["image_size"]
        normalisation = (record["mean"], record["std"])
    built = build_classifier(teacher["network"], num_classes, image_size, normalisation)
    load_weights(built.network, path, "teacher.checkpoint")
    return built


def build_student(config: Mapping[str, Any], spec: Any, teacher: Classifier | None) -> Classifier:
    """The student with its initial weights: drawn from the seed, a checkpoint's, or (fine-tuning) the teacher's."""
    seed_everything(config["seed"], WEIGHTS)
    normalisation = (spec.mean, spec.std)
    pretrained = config["student"].get("pretrained")
    network = config["student"]["network"]
    student = build_classifier(network, spec.num_classes, spec.image_size, normalisation, pretrained)
    kind = METHODS.get(config["method"]["name"])
    if kind is not None and kind.starts_from_teacher and teacher is not None:
        _copy_features(student, teacher)
    checkpoint = config["student"].get("checkpoint")
    if checkpoint:
        load_weights(student.network, Path(checkpoint), "student.checkpoint")
    return student


def _copy_features(student: Classifier, teacher: Classifier) -> None:
    """Everything but the classifier from the teacher."""
    theirs = teacher.network.state_dict()
    fresh = {id(parameter) for parameter in head_of(student.network).classifier.parameters()}
    names = {name for name, parameter in student.network.named_parameters() if id(parameter) in fresh}
    own = student.network.state_dict()
    features = {name: value for name, value in theirs.items() if name not in names}
    if any(name not in own or own[name].shape != value.shape for name, value in features.items()):
        raise UserError("method=finetune: the student must be the teacher's network (set student= to the same network)")
    student.network.load_state_dict({**{name: own[name] for name in names}, **features})


def train_cell(config: dict[str, Any], folder: Path, needs: Mapping[str, Path], progress: Any = None) -> dict[str, Any]:
    """Trains, or goes on training, one cell.

    Args:
        config: The resolved config as plain containers.
        folder: The cell's folder.
        needs: `teacher`: the file with the teacher's weights.
        progress: Where to report steps, see `kt.train.fit`.

    Returns:
        What the result file records of the training: metrics and their labels, speed, memory, data fingerprint, ids.
    """
    rank, world = rank_and_world()
    device = pick_device(config["device"])
    schedule = config["schedule"]
    threads = config["threads"] or (1 if config["dataset"]["name"] == "scenes" else None)
    if threads is not None:
        torch.set_num_threads(threads)
    data = build_data(
        config["dataset"],
        config["data_root"],
        batch_size=schedule["batch_size"],
        seed=config["seed"],
        device=device,
        rank=rank,
        world=world,
        cache_root=Path(config["output_root"]) / "cache",
    )
    spec = data.spec
    method = {key: value for key, value in config["method"].items() if key != "name"}
    kind = METHODS.get(config["method"]["name"])
    wants_teacher = kind is None or kind.needs_teacher
    teacher = build_teacher(config, spec, needs.get("teacher")) if wants_teacher else None
    student = build_student(config, spec, teacher)
    seed_everything(config["seed"], CLASSIFIER)
    built = build_method(config["method"]["name"], student, teacher, **method)
    norm = (config["teacher"] or {}).get("norm") or "eval"
    model = TransferModel(student, built, {"teacher": teacher} if teacher is not None else None, norm)
    if teacher is not None and config["teacher"].get("checkpoint"):
        _score_teacher(teacher, data, device, folder)

    table = config.get("table") or {}
    label = config["method"]["name"]
    run = None
    if rank == 0:
        run = WandbRun(
            folder,
            config["wandb"],
            name=f"{table.get('row') or label}-seed{config['seed']}",
            group=f"{table.get('name') or 'single'}/{table.get('row') or label}",
            tags=[str(tag) for tag in (table.get("name"), table.get("role"), config["scale"]["name"], label) if tag],
            config=config,
        )
    finished = False
    metrics: dict[str, float] = {}
    try:
        metrics = fit(
            model,
            data,
            folder,
            schedule,
            seed=config["seed"],
            device=device,
            precision=config["precision"],
            mirror=run.log if run else None,
            progress=progress,
            snapshots=4 if config["method"]["name"] == "none" else 0,
        )
        finished = True
    finally:
        if run is not None:
            run.finish(metrics, failed=not finished)
    if rank == 0:
        mean, std = (buffer.flatten().tolist() for buffer in (student.mean, student.std))
        record = {"network": dict(config["student"]["network"]), "num_classes": spec.num_classes}
        record |= {"image_size": spec.image_size, "mean": mean, "std": std}
        write_json(folder / "student.json", record)
    return {
        "metrics": metrics,
        "labels": metric_labels(spec.num_classes),
        "images_per_second": images_per_second(folder),
        "peak_memory": peak_memory(device),
        "dataset_fingerprint": spec.fingerprint,
        "wandb_id": run.id if run else None,
        "num_classes": spec.num_classes,
        "train_size": spec.train_size,
        "test_size": spec.test_size,
        **built.facts,
    }


def _score_teacher(teacher: Classifier, data: Any, device: torch.device, folder: Path) -> None:
    """A teacher from outside is scored before it teaches; one near chance was probably loaded wrongly."""
    classes = data.spec.num_classes
    if teacher.head.classifier.out_features != classes:
        return
    metrics = evaluate_accuracy(teacher.to(device), data.test, classes)
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluations" / "teacher.json", metrics)
    if metrics["top1"] < 200.0 / classes:
        logger.warning("THE TEACHER IS NEAR CHANCE: top1 %.2f on %d classes", metrics["top1"], classes)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
