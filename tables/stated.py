"""Which settings of a run its paper prints: keys of a config with the record's values and where these stand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kt.settings import KD, METHODS
from tables.records import TableRecord

Stated = dict[str, tuple[Any, str]]  # key of a config -> printed value, and the field of the record that has it

# Fields of a protocol that are numbers -> keys of a schedule.
_NUMBERS = {"lr": "lr", "weight_decay": "weight_decay", "momentum": "momentum", "schedule.factor": "gamma"}
_POLICIES = {"polynomial": "poly"}  # a printed policy's first word -> its key, where that is another
# Fields of a row -> keys of a config.
_ROWS = {
    **{"strategy": "method.strategy", "consistency": "method.metric", "scheduler": "schedule.policy"},
    **{"student_state": "method.student_state", "teacher_state": "method.teacher_state"},
    **{"search_dataset": "method.search.dataset.name"},
}


def stated(record: TableRecord, row_id: str, settings: Mapping[str, Any]) -> Stated:
    """What the paper prints of a row's settings.

    Args:
        record: The table's record.
        row_id: The row; of one that is not printed the protocol alone is known.
        settings: Dotted key -> value of the run. A key that is not among them is left out.
    """
    line = next((row for row in record.rows if row["id"] == row_id), {})
    found: dict[str, tuple[Any, str]] = {}
    names = [line["protocol"]] if "protocol" in line else record.protocol_names
    if len(names) == 1:
        protocol = record.document["protocols"][names[0]]
        for key, (value, field) in (*_recipe(protocol, settings, "schedule."), *_method(protocol, settings)):
            found[key] = value, f"protocols.{names[0]}.{field}"
    for name, protocol in record.document["protocols"].items():
        if name.endswith("_search") and record.table["id"] in protocol["applies_to"]:
            for prefix in ("method.search.", "method.base.search."):
                for key, (value, field) in _recipe(protocol, settings, f"{prefix}schedule."):
                    found[key] = value, f"protocols.{name}.{field}"
                if isinstance(protocol["lr"], dict):
                    found[f"{prefix}alpha_lr"] = protocol["lr"]["alpha"], f"protocols.{name}.lr.alpha"
    found |= {key: (value, f"the row's {field}") for key, (value, field) in _row(line, settings)}
    if len(record.datasets) == 1:
        name = dataset_key(record.datasets[0])
        # It may be the one that students are scored on.
        found["evaluation" if settings.get("evaluation") == name else "dataset.name"] = name, "dataset"
    return {key: each for key, each in found.items() if key in settings}


def agrees(ours: Any, printed: Any) -> bool:
    """Whether a run's value is the printed one, to the digits that a share of a length may have."""
    if isinstance(printed, list):
        return isinstance(ours, list) and len(ours) == len(printed) and all(map(agrees, ours, printed))
    if isinstance(printed, int | float) and isinstance(ours, int | float):
        return math.isclose(ours, printed, rel_tol=1e-4)
    return bool(ours == printed)


def _field(protocol: Mapping[str, Any], path: str) -> Any:
    value: Any = protocol
    for key in path.split("."):
        value = value[key]
    return value


def _recipe(
    protocol: Mapping[str, Any], settings: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Key -> printed value and field, of the schedule whose keys begin with `prefix`."""
    for field, key in _NUMBERS.items():
        if isinstance(value := _field(protocol, field), int | float):
            yield prefix + key, (value, field)
    if isinstance(optimizer := protocol["optimizer"], str):
        yield f"{prefix}optimizer", (optimizer.lower(), "optimizer")
    batch = protocol["batch_size"]
    if batch is not None:
        yield f"{prefix}batch_size", (batch if isinstance(batch, int) else math.prod(batch.values()), "batch_size")
    schedule = protocol["schedule"]
    if isinstance(total := schedule["total"], int):
        yield prefix + schedule["unit"], (total, "schedule.total")
    if schedule["policy"] is not None and schedule["unit"] is not None:
        word = schedule["policy"].split()[0]
        yield f"{prefix}policy", (_POLICIES.get(word, word), "schedule.policy")
    length = settings.get(f"{prefix}epochs") or settings.get(f"{prefix}iterations")
    if schedule["milestones"] is not None and length:
        found = _milestones(schedule["milestones"], length)
        yield f"{prefix}milestones", ([step / length for step in found], "schedule.milestones")


def _milestones(printed: list[int] | str, length: int) -> list[int]:
    """Where the learning rate falls: as listed, or by a rule such as `every 30 after the first 150`."""
    if isinstance(printed, list):
        return printed
    rule = re.fullmatch(r"every (\d+)(?: after the first (\d+))?", printed)
    assert rule is not None, printed
    first = int(rule[2] or rule[1])
    return list(range(first, length, int(rule[1])))


def _method(protocol: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Key -> printed value and field, of the method and of one around which it is."""
    schema = METHODS.get(str(settings.get("method.name")))
    if schema is not None and issubclass(schema, KD) and isinstance(protocol["temperature"], int | float):
        yield "method.temperature", (protocol["temperature"], "temperature")
    weights = protocol["loss_weights"]
    for group in ("method", "method.base"):
        name = settings.get(f"{group}.name")
        if isinstance(weights.get(name), int | float) and settings.get(f"{group}.weight") is not None:
            yield f"{group}.weight", (weights[name], f"loss_weights.{name}")
    if str(weights.get("alpha")).startswith("dynamic"):
        yield "method.balance", ("dynamic", "loss_weights.alpha")
    elif isinstance(weights.get("L1"), int | float):
        yield "method.balance", (weights["L1"], "loss_weights.L1")
    if isinstance(clip := protocol.get("clip"), dict):
        yield "method.clip", (clip["tau"], "clip.tau")


def _row(line: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Key -> printed value and field, of what tells a row from others."""
    for who in ("teacher", "student"):
        if line.get(who) is not None:
            name, run = network_key(line[who]), str(settings.get(f"{who}.network.name"))
            # Of a segmentor or a depth network the backbone is printed.
            yield f"{who}.network.name", (run if run.endswith(f"_{name}") else name, who)
    for field, key in _ROWS.items():
        if field in line:
            yield key, (str(line[field]).removesuffix("_resized_224"), field)
    if isinstance(line.get("K"), int):  # of stages or of groups: a method has one of them
        yield from ((key, (line["K"], "K")) for key in ("method.stages", "method.groups"))
    if isinstance(epochs := line.get("values", {}).get("epochs"), int):
        yield "schedule.epochs", (epochs, "values.epochs")
    if (setting := str(line.get("setting"))).startswith("fixed_"):
        word = setting.removeprefix("fixed_")
        yield "method.frozen", ({"feature": "features"}.get(word, word), "setting")
    if "method" in line:
        yield "method.name", (settings.get("method.name"), "method")


def dataset_key(name: str) -> str:
    """A printed dataset's name as configs spell it."""
    key = re.sub("[^a-z0-9]", "", name.lower().split("(")[0])
    return {"imagenet1k": "imagenet"}.get(key, key)


def network_key(name: str) -> str:
    """A printed network's name as configs spell it."""
    name = name.replace("_x0.5", "_half")
    return f"fasterrcnn_{name.removeprefix('fpn_')}" if name.startswith("fpn_") else name
