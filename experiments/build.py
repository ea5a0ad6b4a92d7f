"""From a cell's resolved config to a trained student: data, networks, method, and `kt.train.fit`."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.devices import own_memory, pick_device
from experiments.meaning import evaluation_dataset, is_of_library, states_of, teaches_in_bf16
from kt import ranks
from kt.classifier import Classifier
from kt.cost import few_images
from kt.data import DATASETS, Data, DataSpec, build_data, unlabelled
from kt.data.loaders import Loader
from kt.dense import Backbone, DenseModel, as_teacher
from kt.engine import seed_everything
from kt.errors import UserError, needs_mm
from kt.evaluation.accuracy import metric_labels
from kt.evaluation.outcomes import Outcomes, keep_outcomes
from kt.files import replacing, write_json, write_text
from kt.methods import Method, build_method, find_method
from kt.models import NETWORKS, build_network
from kt.models.build import normalisation_of_weights
from kt.models.checkpoints import load_backbone, load_weights
from kt.needs import SNAPSHOTS, WEIGHTS
from kt.settings import METHODS as SETTINGS
from kt.settings import SOURCE, device_batch
from kt.stages import IMAGENET, head_of
from kt.store import DESCRIPTION, cache_of, evaluation_file, listed, outcomes_file, records_file
from kt.students import load_model, read_description
from kt.train import best_metrics, fit, images_per_second, phase_records
from kt.transfer import TransferModel, evaluating
from kt.wandb import MARK, WandbRun, about_cell, summary_of

logger = logging.getLogger(__name__)

# Weights are drawn from their own stream, so that every method of a seed starts from the same student.
WEIGHTS_STREAM, CLASSIFIER_STREAM = 1_000_003, 1_000_033


def build_classifier(
    network: Mapping[str, Any], num_classes: int, image_size: int, normalisation: Any, pretrained: str | None = None
) -> Classifier:
    """A network of the config with the given normalisation, or with that of its weights where it comes pretrained."""
    settings = {key: value for key, value in network.items() if value is not None and key != "options"}
    plain = build_network(**settings, num_classes=num_classes, image_size=image_size, pretrained=pretrained)
    return Classifier(plain, normalisation_of_weights(network["name"], pretrained) if pretrained else normalisation)


def _loading(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """How a cell's loaders are made, for this process."""
    found = {"batch_size": config["schedule"]["batch_size"], "seed": config["seed"], "device": device}
    return found | {"rank": ranks.rank(), "world": ranks.world_size(), "cache_root": cache_of(config["output_root"])}


def read_data(
    config: Mapping[str, Any], dataset: Mapping[str, Any], device: torch.device, workers: int | None = None
) -> Data:
    """Loaders and scores of a dataset, for this process; `workers` as for `kt.data.build_data`."""
    loading = {**_loading(config, device), "workers": workers, "device_batch": config["schedule"]["device_batch"]}
    return build_data(dataset, config["data_root"], **loading)


def read_source(
    config: Mapping[str, Any], dataset: Mapping[str, Any], device: torch.device, workers: int | None = None
) -> Loader:
    """A loader of the unlabelled images that a method draws from, for this process."""
    loading = {**_loading(config, device), "workers": workers}
    return unlabelled(dataset, config["method"]["source_share"], config["data_root"], **loading)


def build_dense_model(
    network: Mapping[str, Any],
    num_classes: int,
    image_size: Any,
    normalisation: Any,
    pretrained: str | None = None,
    checkpoint: str | Path | None = None,
    given: bool = True,
) -> tuple[DenseModel, dict[str, Any]]:
    """A detector, segmentor or pose network and the config that mmdet or mmseg build it from.

    Of a network whose weights come from a checkpoint, the weights that its config names are not fetched. Pretrained
    weights also decide what stays fixed; `given` says whether they are really taken.
    """
    needs_mm(f"network.name={network['name']}")
    from kt.models.dense import build_dense, dense_config, read_config, without_pretrained

    if network["config"] is not None:
        model = read_config(network["config"], network["options"], num_classes)
        model = without_pretrained(model) if checkpoint else model
    else:
        model = dense_config(network["name"], num_classes, network["width"], image_size, normalisation, pretrained)
    return DenseModel(build_dense(model if given else without_pretrained(model))), model


def build_teacher(config: Mapping[str, Any], spec: Any, path: Path | None) -> Classifier | Backbone | None:
    """The teacher with its weights; its classes and normalisation are those it was trained with.

    A detector's or segmentor's teacher gives its backbone alone, whatever its own task is, unless the method needs all
    of it.
    """
    teacher = config["teacher"]
    if not teacher or not teacher.get("network"):
        return None
    network = teacher["network"]
    if path is None:
        raise UserError(f"teacher={network['name']}: it has neither a checkpoint nor a cell to take it from")
    if path.with_name(DESCRIPTION).exists():
        found = as_hidden(load_model(path, "teacher.checkpoint", network), spec)
        if isinstance(found, Backbone) and found.normaliser.sparse and len(spec.mean) == 3:
            raise UserError(
                f"teacher={network['name']}: was trained with measured depth beside colours, of which the student's "
                "images have none; expected a teacher trained with dataset.depth_samples=0"
            )
        return found
    if network["name"] not in NETWORKS:
        model, _ = build_dense_model(
            network, spec.num_classes, config["dataset"]["image_size"], IMAGENET, checkpoint=path
        )
        if SETTINGS[config["method"]["name"]].whole_teacher:
            load_weights(model.network, path, "teacher.checkpoint")
        else:
            load_backbone(model.network.backbone, path, "teacher.checkpoint")
        return model
    built = build_classifier(network, spec.num_classes, spec.image_size, (spec.mean[:3], spec.std[:3]))
    load_weights(built.network, path, "teacher.checkpoint")
    return as_hidden(built, spec)


def as_hidden(model: Classifier | DenseModel, spec: Any) -> Classifier | Backbone:
    """A network for a student of the task; detectors and segmentors take a classifier's stages."""
    return model if spec.task == "classification" and isinstance(model, Classifier) else as_teacher(model)


def build_student(
    config: Mapping[str, Any], spec: Any, teacher: Classifier | Backbone | None, given: bool = True
) -> tuple[Classifier | DenseModel, dict[str, Any] | None]:
    """The student with its initial weights: drawn from the seed, a checkpoint's, or (fine-tuning) the teacher's.

    Its input normalisation goes with the weights; where they are drawn, it is the dataset's.

    Args:
        config: The resolved config.
        spec: Of the data, see `kt.data.DataSpec`.
        teacher: Whose weights it may start from.
        given: Whether weights that the config names are read; a rehearsal can do without.

    Returns:
        The student, and for a detector or segmentor the config that mmdet or mmseg build it from.
    """
    seed_everything(config["seed"], WEIGHTS_STREAM)
    pretrained = config["student"].get("pretrained")
    network, checkpoint = config["student"]["network"], config["student"].get("checkpoint") if given else None
    normalisation = (spec.mean, spec.std)
    if checkpoint and Path(checkpoint).with_name(DESCRIPTION).exists():
        described = read_description(Path(checkpoint))
        normalisation = (described["mean"], described["std"])
    if spec.task != "classification":
        size = config["dataset"]["image_size"]
        dense, model = build_dense_model(network, spec.num_classes, size, normalisation, pretrained, checkpoint, given)
        if checkpoint:
            load_weights(dense.network, Path(checkpoint), "student.checkpoint")
        return dense, model
    weights = pretrained if given else None
    student = build_classifier(network, spec.num_classes, spec.image_size, normalisation, weights)
    if find_method(config["method"]["name"]).starts_from_teacher and isinstance(teacher, Classifier):
        _copy_features(student, teacher, config["method"]["name"])
    if checkpoint:
        load_weights(student.network, Path(checkpoint), "student.checkpoint")
    return student, None


def _copy_features(student: Classifier, teacher: Classifier, method: str) -> None:
    """Everything but the classifier from the teacher, its input normalisation included."""
    theirs = teacher.network.state_dict()
    fresh = {id(parameter) for parameter in head_of(student.network).classifier.parameters()}
    names = {name for name, parameter in student.network.named_parameters() if id(parameter) in fresh}
    own = student.network.state_dict()
    features = {name: value for name, value in theirs.items() if name not in names}
    if any(name not in own or own[name].shape != value.shape for name, value in features.items()):
        raise UserError(
            f"method={method}: the student must be the teacher's network (set student= to the same network)"
        )
    student.network.load_state_dict({**{name: own[name] for name in names}, **features})
    student.mean, student.std = teacher.mean.clone(), teacher.std.clone()


def check_described(student: DenseModel, data: Data, file: str) -> None:
    """Refuses a network from a config file that cannot learn from the data, by the losses of two images.

    Args:
        student: The network.
        data: What it is to learn from.
        file: The config file.

    Raises:
        UserError: Its parts do not fit together, or it is for another task.
    """
    batch = student.prepare(few_images(next(iter(data.train.epoch(0)))))
    try:
        with evaluating(student):
            student.task(student.extract(batch["inputs"]), batch)
    except Exception as error:  # a config is a program: anything may go wrong in what it describes
        reason = (str(error) or "no message").splitlines()[0]
        raise UserError(
            f"student.network.config={file}: describes no network for {data.spec.task} that could be trained "
            f"({type(error).__name__}: {reason})"
        ) from None


def options_of(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings as `build_method` takes them: without its name and what says which cells are needed."""
    unused = ("name", *SETTINGS[method["name"]].cell_keys)
    found = {key: value for key, value in method.items() if key not in unused}
    if base := found.get("base"):
        found["base"] = {"name": base["name"], **options_of(base)}
    return found


def assemble(
    config: Mapping[str, Any],
    spec: Any,
    hidden: Mapping[str, Any],
    files: Mapping[str, Path],
    given: bool = True,
) -> tuple[TransferModel, dict[str, Any] | None]:
    """A cell's model before its training: the student, its method and the networks beside it.

    Args:
        config: The resolved config.
        spec: Of the data, see `kt.data.DataSpec`.
        hidden: The networks that it needs by name, `teacher` among them.
        files: What else the method needs of other cells.
        given: As for `build_student`.

    Returns:
        The model, and the student's config as `build_student` gives it.
    """
    teacher = hidden.get("teacher")
    student, model_config = build_student(config, spec, teacher, given)
    seed_everything(config["seed"], CLASSIFIER_STREAM)
    method = options_of(config["method"])
    built = build_method(config["method"]["name"], student, teacher, data=spec, files=files, **method)
    norm = (config["teacher"] or {}).get("norm") or "eval"
    return TransferModel(student, built, hidden, norm, "bf16" if teaches_in_bf16(config) else "fp32"), model_config


def train_cell(config: dict[str, Any], folder: Path, needs: Mapping[str, Path], progress: Any = None) -> dict[str, Any]:
    """Trains, or goes on training, one cell.

    Args:
        config: The resolved config as plain containers.
        folder: The cell's folder.
        needs: What it needs, by name: `teacher` the file of the teacher's weights, others see `kt.needs.Need`.
        progress: Where to report steps, see `kt.train.fit`.

    Returns:
        What the result file records of the training: metrics and their labels, speed, memory, ids.
    """
    if is_of_library(config) and not states_of(config):
        return keep_weights(config, folder)
    device = pick_device(config["device"])
    schedule = config["schedule"]
    set_threads(config)
    data = read_data(config, config["dataset"], device)
    spec = data.spec
    name = config["method"]["name"]
    if source := config["method"].get(SOURCE):
        data.further[SOURCE] = read_source(config, source, device)
    teacher = build_teacher(config, spec, needs.get("teacher")) if SETTINGS[name].needs_teacher else None
    # Before the student's seed: drawing the weights that are then replaced shifts nobody's random numbers.
    hidden = needed_networks(needs, spec) | ({} if teacher is None else {"teacher": teacher})
    files = {need: path for need, path in needs.items() if need != "teacher" and path.name not in (WEIGHTS, SNAPSHOTS)}
    model, model_config = assemble(config, spec, hidden, files)
    student, built = model.student, model.method
    if described := config["student"]["network"]["config"]:
        check_described(student, data, described)
    if isinstance(teacher, Classifier) and config["teacher"].get("checkpoint"):
        _score_teacher(teacher, data, device, folder)

    settings = config["wandb"] if ranks.is_first() else {"mode": "disabled"}
    with WandbRun(config["output_root"], settings, about_cell(folder.name, config), folder / MARK) as run:
        metrics = fit(
            model,
            data,
            folder,
            schedule,
            seed=config["seed"],
            device=device,
            precision=config["precision"],
            activation_checkpointing=config["activation_checkpointing"],
            compile=config["compile"],
            mirror=run.log if run.id else None,
            progress=progress,
            snapshots=count_snapshots(config),
        )
        if ranks.is_first():
            describe_student(folder, config, student, model_config, spec)
        found = {
            "metrics": metrics,
            "best": best_metrics(folder),
            "labels": metric_labels(spec.num_classes) if spec.task == "classification" else {},
            "images_per_second": images_per_second(folder),
            "phases": phase_records(folder, schedule["batch_size"]),
            "device_batch": device_batch(schedule, ranks.world_size()),
            "peak_memory": peak_memory(device),
            "wandb_id": run.id,
            "num_classes": spec.num_classes,
            "train_size": spec.train_size,
            "test_size": spec.test_size,
            **count_operations(model, data),
            **built.facts,
        }
        run.summarise(summary_of(found))
    return found


def keep_weights(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A cell of a library's weights without the data that would score them: what others need of it, and no score."""
    network, weights = config["student"]["network"], config["student"]["pretrained"]
    mean, std = normalisation_of_weights(network["name"], weights)
    size, classes = config["dataset"]["image_size"], config["dataset"]["num_classes"]
    spec = DataSpec(config["dataset"]["name"], classes, size, mean, std, 0, 0, ())
    student = build_classifier(network, classes, size, (mean, std), weights)
    if ranks.is_first():
        with replacing(folder / WEIGHTS) as file:
            torch.save(student.network.state_dict(), file)
        describe_student(folder, config, student, None, spec)
        records_file(folder).touch()
        evaluation_file(folder, "test").parent.mkdir(exist_ok=True)
        write_json(evaluation_file(folder, "test"), {})
    return {"metrics": {}, "best": {}, "labels": {}, "num_classes": classes, "train_size": 0, "test_size": 0}


def count_operations(model: TransferModel, data: Data) -> dict[str, Any]:
    """`flops` per image of a method's phases, where it makes a claim about them."""
    if type(model.method).flops is Method.flops:
        return {}
    return {"flops": model.method.flops(model, few_images(next(iter(data.train.epoch(0)))))}


def needed_networks(needs: Mapping[str, Path], spec: Any) -> dict[str, Any]:
    """The networks beside the teacher that a cell needs of other cells, by name, each built as its own cell's student.

    Of the snapshots of a training, the last one is that cell's student itself and left out.
    """
    found: dict[str, Any] = {}
    for name, path in needs.items():
        if name != "teacher" and path.name == WEIGHTS:
            found[name] = as_hidden(load_model(path, name), spec)
        elif path.name == SNAPSHOTS:
            for number, snapshot in enumerate(snapshots_of(path)[:-1]):
                found[f"{name}{number}"] = as_hidden(load_model(snapshot, name), spec)
    return found


def count_snapshots(config: Mapping[str, Any]) -> int:
    """How many snapshots a cell keeps: a plain training has those that others are anchored to."""
    return 4 if config["method"]["name"] == "none" else 0


def snapshots_of(folder: Path) -> list[Path]:
    """The weights-only snapshots that a finished cell keeps, from the first epoch to the last."""
    found = listed(folder.parent, f"{SNAPSHOTS}/")
    return sorted(found, key=lambda path: int(path.stem.removeprefix("epoch_")))


def set_threads(config: Mapping[str, Any]) -> None:
    """The number of CPU threads: on embedded data one.

    Slim networks gain little from a second thread, and lose tenfold when another process wants the same cores.
    """
    threads = config["threads"] or (1 if DATASETS[config["dataset"]["name"]].embedded else None)
    if threads is not None:
        torch.set_num_threads(threads)


def describe_student(
    folder: Path, config: Mapping[str, Any], student: Any, model_config: dict[str, Any] | None, spec: Any
) -> None:
    """Writes beside the weights what is needed to build their network again.

    `student.json` is kt's own description; a detector or segmentor also gets `student_config.py`, a config from which
    mmdet or mmseg build it.
    """
    record = {"network": dict(config["student"]["network"]), "num_classes": spec.num_classes}
    if model_config is None:
        mean, std = (buffer.flatten().tolist() for buffer in (student.mean, student.std))
        record |= {"image_size": spec.image_size}
    else:
        from mmengine.config import Config

        from kt.models.dense import without_pretrained

        mean, std = student.normaliser.in_rgb()
        record |= {"image_size": list(config["dataset"]["image_size"])}
        own = {
            "StagedBackbone": "kt.models.backbone",
            "DeepLabV2Head": "kt.models.backbone",
            "PoseNetwork": "kt.models.pose",
            "DepthNetwork": "kt.models.depth",
        }
        used = sorted({module for name, module in own.items() if f'"{name}"' in json.dumps(model_config, default=str)})
        imports = {"custom_imports": {"imports": used, "allow_failed_imports": False}} if used else {}
        config_file = Config({**imports, "model": without_pretrained(model_config)})
        write_text(folder / "student_config.py", config_file.pretty_text)
    write_json(folder / DESCRIPTION, {**record, "mean": mean, "std": std})


def evaluate_cell(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The score of a finished cell's student on the dataset that `evaluation` names, with that of each class.

    Raises:
        UserError: The dataset is missing, or has other classes.
    """
    dataset = evaluation_dataset(config)
    assert dataset is not None
    device = pick_device(config["device"])
    set_threads(config)
    data = read_data(config, dataset, device)
    record = read_description(folder / WEIGHTS)
    if data.spec.num_classes != record["num_classes"]:
        raise UserError(
            f"evaluation={config['evaluation']}: it has {data.spec.num_classes} classes, the student was trained with "
            f"{record['num_classes']}"
        )
    outcomes = Outcomes()
    metrics = data.score(load_model(folder / WEIGHTS, "student").eval().to(device), outcomes=outcomes)
    if ranks.is_first():
        keep_outcomes(outcomes_file(folder, config["evaluation"]), outcomes.images, outcomes.sheet)
    return outcomes.beside(metrics)


def _score_teacher(teacher: Classifier, data: Any, device: torch.device, folder: Path) -> None:
    """A teacher from outside is scored before it teaches; one near chance was probably loaded wrongly."""
    classes = data.spec.num_classes
    if teacher.head.classifier.out_features != classes:
        return
    metrics = data.score(teacher.to(device))
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluations" / "teacher.json", metrics)
    if metrics["top1"] < 200.0 / classes:
        logger.warning("THE TEACHER IS NEAR CHANCE: top1 %.2f on %d classes", metrics["top1"], classes)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not rusage's where it can be helped: a process starts with the peak of the one that it was forked from.
    return own_memory("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
