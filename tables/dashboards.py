"""`python -m tables.dashboards [<table> ...] [--publish]`: each table's Weights & Biases workspace, as code.

Written offline as `workspace.json` beside the table, it shows what `tables.mirror` and `kt.wandb` have logged. Needs
`wandb-workspaces` (the extra `dashboards`), and only publishing an account.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kt import command
from kt.errors import Parser, UserError
from kt.files import at_home, read_json, read_sealed, write_text
from kt.store import folder_of, read_records, read_results, records_file
from kt.wandb import summary_of
from tables.folders import CONTENT
from tables.mirror import about_table, figures_of
from tables.render import heading

Json = dict[str, Any]

FILE = "workspace.json"
# Records that say how a method weighs, by how their names begin; the others are losses and scores.
WEIGHTS = {"Balance": ("balance",), "Pathways": ("weight_", "logit_", "live", "unexplained")}
FIXED = ("kind", "phase", "step", "epoch", "images_per_second")
COSTS = ("training_seconds", "images_per_second", "peak_memory", "flops")


def record_names(table: Mapping[str, Any], output_root: str | os.PathLike[str]) -> dict[str, list[str]]:
    """What the finished cells of a table have recorded of their training: name -> as W&B has it, once a phase."""
    found: dict[str, dict[str, None]] = {}
    for row in table["rows"]:
        for cell in row["cells"]:
            path = records_file(folder_of(output_root, cell["id"]))
            for record in read_records(path, "train") if cell["status"] == "done" else ():
                for name in record.keys() - set(FIXED):
                    key = name if name.startswith("lr") else f"{record['phase']}/{name}"
                    found.setdefault(name, {})[key] = None
    return {name: sorted(found[name]) for name in sorted(found)}


def workspace(folder: Path, table: Mapping[str, Any], output_root: str | os.PathLike[str]) -> Any:
    """A table's workspace, in no project yet.

    Args:
        folder: Where the table has been rendered.
        table: Its `table.json`.
        output_root: Where `cells/` is.

    Raises:
        UserError: `wandb-workspaces` is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("dashboards need wandb-workspaces: pip install -e '.[dashboards]'") from None
    about, records = about_table(folder, table), record_names(table, output_root)
    of_row: Json = {"groupby": wr.Config("what"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}

    def curve(title: str, keys: Sequence[str]) -> Any:
        return wr.LinePlot(title=title, x="step", y=list(keys), title_x="updates", **of_row)

    def bars(metric: Mapping[str, Any]) -> Any:
        chart = wr.CustomChart.from_table(
            "results", {"label": "row", "value": metric["label"]}, {"title": heading(metric)}
        )
        chart.chart_name = "wandb/bar/v0"
        return chart

    weighing = {title: [name for name in records if name.startswith(prefixes)] for title, prefixes in WEIGHTS.items()}
    drawn = [name for name in records if not any(name in names for names in weighing.values())]
    tested = [metric for metric in table["metrics"] if any(metric["name"] in (r["mean"] or {}) for r in table["rows"])]
    results = read_results(output_root, {cell["id"] for row in table["rows"] for cell in row["cells"]})
    costs = [name for name in COSTS if any(name in summary_of(result) for result in results.values())]
    tables = [wr.WeavePanelSummaryTable(table_name=name) for name in ("results", "verdicts")]
    sections = {
        "Results": [*map(bars, tested), *tables[: 1 + ("claims" in table)]],
        "Curves": [
            *(curve(f"test {metric['label']}", [f"test/{metric['name']}"]) for metric in tested),
            *(curve(name, records[name]) for name in drawn),
            curve("phase", ["phase"]),
        ],
        **{title: [curve(name, records[name]) for name in names] for title, names in weighing.items()},
        "Cost": [wr.BarPlot(title=name, metrics=[wr.SummaryMetric(name)], **of_row) for name in costs],
        "Pictures": [
            wr.MediaBrowser(title=name.partition("/")[2], media_keys=[name])
            for name in figures_of(folder, table, output_root)
        ],
    }
    for name, panels in sections.items():
        for number, panel in enumerate(panels):
            panel._id = f"{name}-{number}".lower()  # the same when it is published again
    return ws.Workspace(
        entity="",
        project="",
        name=about["name"],
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items() if panels],
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Tags().isin([about["group"]])),
            pinned_columns=["run:displayName", *(f"summary:{metric['name']}" for metric in tested)],
        ),
    )


def write_workspace(folder: Path, output_root: str | os.PathLike[str], project: str | None, entity: str | None) -> str:
    """Writes a table's workspace beside it and, with a project, publishes it there; returns where it is.

    Published again, it takes the place of the one before.

    Raises:
        UserError: See `workspace`; or W&B has refused.
    """
    table, file = read_sealed(folder / CONTENT), folder / FILE
    if not table:
        raise UserError(f"{folder / CONTENT}: expected it as it was written; run the table again")
    made, before = workspace(folder, table, output_root), read_json(file) or {}
    if not {"entity", "project", "name", "id"} <= before.keys():
        before = {}
    place = str(file)
    if project is not None:
        import wandb

        try:
            made.entity, made.project = entity or wandb.Api().default_entity, project
            if (before.get("entity"), before.get("project")) == (made.entity, made.project):
                made._internal_name, made._internal_id = before["name"], before["id"]
            place = made.save().url
        except Exception as error:  # noqa: BLE001 - no key, no network, no such project: whatever the service raises
            raise UserError(f"Weights & Biases: {type(error).__name__}: {' '.join(str(error).split())}") from None
    elif before:  # where it has been published
        made.entity, made.project = before["entity"], before["project"]
        made._internal_name, made._internal_id = before["name"], before["id"]
    view = made._to_model().model_dump(by_alias=True, exclude_none=True)
    write_text(file, json.dumps(view, indent=1, ensure_ascii=False) + "\n")
    return place


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit status.

    Raises:
        UserError: A mistake in the arguments.
    """
    parser = Parser("python -m tables.dashboards", description=str(__doc__).split(": ", 1)[1])
    parser.add_argument("names", nargs="*", metavar="table", help="by default all tables that have been rendered")
    parser.add_argument("--output-root", default="outputs", help="where results are (default: outputs)")
    parser.add_argument("--publish", action="store_true", help="save them in the project, once the runs are synced")
    parser.add_argument("--project", default="kt", help="the project of the runs (default: kt)")
    parser.add_argument("--entity", help="its user or team; by default the account's own")
    options = parser.parse_args(arguments)
    root = at_home(options.output_root)
    found = {path.parent: path.parts[-3] for path in sorted(root.glob(f"tables/*/*/{CONTENT}"))}
    for name in options.names:
        if name not in found.values():
            known = ", ".join(dict.fromkeys(found.values())) or "none"
            raise UserError(f"{name}: no such table has been rendered in {root}; it has {known}")
    if not found:
        raise UserError(f"--output-root={root}: expected a folder with rendered tables, there are none")
    for folder, name in found.items():
        if not options.names or name in options.names:
            print(write_workspace(folder, root, options.project if options.publish else None, options.entity))
    return 0


if __name__ == "__main__":
    sys.exit(command.run(lambda: run(sys.argv[1:])))
