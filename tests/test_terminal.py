"""What a person sees on a terminal: tables that fold, the overview, --help, --version and completion with TAB."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import kt
from configs import load, table
from experiments.checking import plain
from experiments.completion import INSTALL, candidates
from experiments.groups import choices
from experiments.help import meaning
from experiments.meaning import identity
from experiments.run import add_recipe, main, normalise
from experiments.schema import Config
from kt.data.names import DATASETS
from kt.settings import METHODS, Settings, epochs_of, kinds
from results import make_row, write_cell
from tables.collect import collect
from tables.records import find_table
from tables.render import write_table
from tables.summary import show_rendering
from tables.sweeps import collect_sweep
from tables.terminal import draw, draw_sweep

pytestmark = pytest.mark.usefixtures("no_cell_pages")

ROOT = Path(__file__).resolve().parent.parent
LABELS = {"top5": "top-2 of 10 classes"}

# ------------------------------------------------------------------------------------------------------------- results


def rows_of(root: Path, name: str, **result: object) -> list[dict]:
    """Every printed row of a table, done, each number another one."""
    rows = [make_row(name, line["id"]) for line in find_table(name).rows]
    for number, row in enumerate(rows):
        metrics = {metric["name"]: 11.11 + number + 30 * place for place, metric in enumerate(find_table(name).metrics)}
        write_cell(root, row["cells"][0]["id"], metrics, **result)
    return rows


def drawn(width: int, content: dict, sweep: bool = False, color: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, color_system="standard" if color else None)
    (draw_sweep if sweep else draw)(console, content, Path("outputs") / "index.html")
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_folds_at_the_width_of_the_terminal(width: int, tmp_path: Path) -> None:
    name = "citypersons_pose"  # four metrics, long names of networks
    shown = drawn(width, collect(name, rows_of(tmp_path, name), tmp_path, "mini", "scenes"))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    numbers = [f"{11.11 + row + 30 * place:.2f}" for row in range(4) for place in range(4)]
    printed = [f"{value:.2f}" for row in find_table(name).rows for value in row["values"].values()]
    for number in (*numbers, *printed):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", shown), number
    heads = sum(line.split()[:2] == ["row", "networks"] for line in lines)
    assert heads == {40: 4, 80: 2, 200: 1}[width]
    assert lines[-1] == "Page: outputs/index.html"


def test_a_table_says_what_is_what(tmp_path: Path) -> None:
    name = "imagenet_compression"
    rows = rows_of(tmp_path, name, labels=LABELS, best={"top1": 90.0})
    (tmp_path / "cells" / rows[1]["cells"][0]["id"] / "result.json").unlink()
    content = collect(name, rows, tmp_path, "mini", "scenes")
    for claim, verdict in zip(content["claims"], ("holds", "fails"), strict=False):
        claim["verdict"] = verdict
    shown = drawn(100, content, color=True)
    words = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "top-2 of" in words and "top-5" not in words and "(90.00)" in words
    assert "not comparable with the paper" in words and "resnet50 → mobilenet_v1" in words
    for colour, verdict in ((32, "holds"), (31, "fails"), (33, "unknown")):
        assert f"\x1b[1;{colour}m{verdict}" in shown
    assert "1 holds, 1 fails, 4 unknown" in words and "\x1b[31mX" in shown.replace(" ", "")
    assert "\x1b[1m17.11" in shown  # the best of ours


def test_a_judge_calls_metrics_as_results_do(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "stage_count", labels=LABELS)
    told = [claim["evidence"] for claim in collect("stage_count", rows, tmp_path, "mini", "scenes")["claims"]]
    assert any("top-1 accuracy and top-2 of 10 classes" in text for text in told)
    assert not any("top-5" in text for text in told)


def test_a_sweep_has_the_scores_that_were_asked_for(tmp_path: Path) -> None:
    """Those on other data are called as the student's own."""
    write_cell(tmp_path, "kd-s0", {"top1": 1.0}, evaluations={"scenes_small": {"top5": 61.25}}, labels=LABELS)
    point = {"id": "kd", "row": "kd", "label": "kd", "role": "method", "method": "kd", "teacher": "a", "student": "b"}
    point |= {"axes": {"method": "kd"}, "cells": [{"id": "kd-s0", "seed": 3}], "evaluation": "scenes_small"}
    shown = drawn(80, collect_sweep("sweep-1", ["method"], [point], tmp_path), sweep=True)
    assert "top-2 of" in shown and "61.25" in shown and "1.00" not in shown


def test_only_a_terminal_gets_the_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_table("kcd_dynamic", rows_of(tmp_path, "kcd_dynamic"), tmp_path, "mini", "scenes")
    show_rendering(folder)
    out = capsys.readouterr().out
    assert (folder / "table.md").read_text() in out and out.endswith(f"{folder / 'index.html'}\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    show_rendering(folder)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "| " not in out and f"Page: {folder / 'index.html'}" in out


# -------------------------------------------------------------------------------------------------------------- lengths


def composed(*arguments: str) -> dict:
    return plain(load(add_recipe(normalise(arguments))))


@pytest.mark.parametrize(
    ("arguments", "epochs", "iterations"),
    [
        (["schedule.iterations=50"], None, 50),
        (["schedule.iterations=50", "dataset=scenes_seg", "student=deeplabv2_vgg16"], None, 50),
        (["schedule.epochs=1", "dataset=scenes_seg", "student=deeplabv2_vgg16"], 1, None),
        (["schedule.epochs=null", "schedule.iterations=50"], None, 50),
        (["+schedule.iterations=50", "++schedule.interval=25"], None, 50),
    ],
)
def test_one_key_sets_the_length(arguments: list[str], epochs: int | None, iterations: int | None) -> None:
    schedule = composed(*arguments)["schedule"]
    assert (schedule["epochs"], schedule["iterations"]) == (epochs, iterations)
    assert epochs_of(schedule) == (2 if "++schedule.interval=25" in arguments else 1)


def test_one_key_sets_the_length_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    short = table("imagenet_compression", "schedule.iterations=50", "rows=teacher,kd")
    assert [shown.config["schedule"]["epochs"] for shown in short.shown] == [None, None]
    said = table("imagenet_compression", "schedule.iterations=50", "schedule.epochs=null", "rows=teacher,kd")
    assert list(short.jobs) == list(said.jobs)
    assert short.settings == {"schedule.iterations": ["50"]}  # as the heading says
    alone = composed("schedule.iterations=50", "student=resnet50")
    assert [*short.jobs][0] == identity(alone)
    # A row's own length gives way too.
    rows = {"none": {"label": "a", "role": "baseline", "overrides": {"method": "none", "schedule.epochs": 3}}}
    (row,) = table("kcd_dynamic", "schedule.iterations=50", rows=rows).shown
    assert (row.config["schedule"]["epochs"], row.config["schedule"]["iterations"]) == (None, 50)


# ----------------------------------------------------------------------------------------------------------------- help


def schemas(kind: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for schema in kind.__subclasses__():
        if schema.__module__.startswith(("kt.", "experiments.")):
            yield schema
        yield from schemas(schema)


def test_every_key_and_choice_has_a_meaning() -> None:
    for schema in schemas():
        for key, field in schema.model_fields.items():
            assert field.description, f"{schema.__name__}.{key}"
    for group in ("dataset", "method", "schedule", "scale", "student", "table"):
        for choice in choices(group):
            told = meaning(group, choice)
            assert told and "\n" not in told and "Source" not in told, (group, choice)


def test_help_lists_groups_choices_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for group in ("dataset", "method", "schedule", "scale", "student", "table"):
        assert f"{group}=<choice>" in out
        for choice in choices(group):
            assert re.search(rf"(^|[ ,]){re.escape(choice)}([ ,]|$)", out, re.MULTILINE), (group, choice)
    inner = ("teacher", "student", "method", "scale", "wandb", "table", "dataset", "schedule")
    for key in kinds(Config):
        assert key in inner or re.search(rf"^ +{key}=", out, re.MULTILINE), key
    for schema in {*METHODS.values(), *(spec.settings for spec in DATASETS.values())}:
        for key in kinds(schema):
            assert re.search(rf"^ +(method|dataset)\.{key}[=.]", out, re.MULTILINE) or key == "name", key
    assert re.search(r"^ +schedule.optimizer=adamw +\(sgd \| adam \| adamw\) what takes the steps$", out, re.MULTILINE)
    assert not [line for line in out.splitlines() if line.strip() and line.startswith("kt: ")]


def test_help_of_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "method=kd", "+table=gta5_teachers"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"method.temperature=4.0 +of both softmaxes", out) and "hybrid_gta5" in out
    assert "schedule.lr" not in out


def test_nothing_to_do_is_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == main(["-m"]) == 0
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert "+table=<table>" in out and "--help" in out and "kcd_dynamic" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"kt {kt.__version__} (torch ")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("method=kcd", ["method=kcd", "method=kcd+ab", "method=kcd+fitnet", "method=kcd+rco", "method=kcd+rkd"]),
        ("method=kd,r", ["method=kd,rco", "method=kd,reviewkd", "method=kd,rkd"]),
        ("+table=kcd_d", ["+table=kcd_dynamic"]),
        ("+ta", ["+table="]),
        ("sch", ["schedule=", "schedule."]),
        ("schedule.po", ["schedule.policy="]),
        ("schedule.policy=", [f"schedule.policy={value}" for value in ("step", "cosine", "poly", "constant")]),
        ("teacher.schedule.policy=c", ["teacher.schedule.policy=cosine", "teacher.schedule.policy=constant"]),
        ("method=hybrid_forward method.b", ["method.balance="]),
        ("method=kd method.b", []),
        ("method.balance=", ["method.balance=dynamic"]),
        ("plan=", ["plan=true", "plan=false"]),
        ("+table=gta5_teachers rows=baseline,hybrid_d", ["rows=baseline,hybrid_det"]),
        ("rows=", []),
        ("dataset@teacher.dataset=cif", ["dataset@teacher.dataset=cifar100"]),
        ("evaluation=cons", ["evaluation=consistency_solo", "evaluation=consistency"]),
        ("hydra/l", ["hydra/launcher="]),
        ("--he", ["--help"]),
        ("no.such.key=", []),
    ],
)
def test_completion(words: str, found: list[str]) -> None:
    assert candidates(f"python -m experiments.run {words}") == found


def test_an_empty_word_completes_to_everything() -> None:
    assert {"method=", "schedule.", "plan="} <= set(candidates("python -m experiments.run method=kd "))


def test_bash_completes_behind_its_equals_sign() -> None:
    """By the function that is installed, which leaves other commands of Python alone."""
    lines = ["python -m experiments.run method=kd schedule.policy=po", "python -m pytest -k method=k"]
    code = [INSTALL, 'python() { "$PYTHON" "$@"; }']
    for line in lines:
        words = line.replace("=", " = ").split()
        code.append(f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_CWORD={len(words) - 1}")
        code.append(f'COMP_WORDS=({shlex.join(words)}); COMPREPLY=(); _kt_complete; echo "[${{COMPREPLY[*]}}]"')
    done = subprocess.run(
        ["bash", "-c", "\n".join(code)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["[poly]", "[]"], done.stderr


def test_installing_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-sc", "install=bash"]) == 0
    assert capsys.readouterr().out.strip() == INSTALL
    assert main(["-sc", "install=tcsh"]) == 2
    assert "expected install=bash" in capsys.readouterr().err
