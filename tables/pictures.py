"""What a table's students find in the first test images, beside the truth and what their teachers find."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kt.evaluation.pictures import Pixels, Sheet, colours, read_sheet
from kt.store import folder_of, pictures_file, read_results

Json = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

MOST = 12  # rows that are shown
ORDER = {"teacher": 0, "baseline": 1}  # roles, before those that are taught


class Shown(NamedTuple):
    """A network's pictures, with what to call it."""

    label: str
    network: str
    sheet: Sheet


def shown_pictures(rows: Rows, output_root: str | os.PathLike[str]) -> Json | None:
    """The first test images as a page shows them: the image, its truth, teachers, untaught students, taught ones.

    Args:
        rows: The collected rows of a table.
        output_root: Where `cells/` is.

    Returns:
        `lines`, one an image: `title`, and `pictures` of `label`, `network` and `src`; `rule` and `key`, in words; and
        the `classes` that have colours: `name` and `colour`. None if no cell has kept pictures.
    """
    ordered = sorted(rows, key=lambda row: ORDER.get(row["role"], len(ORDER)))
    main = [row for row in ordered if row["ours"] or row["role"] in ORDER]
    chosen = ordered if len(ordered) <= MOST else main[:MOST]
    cells = [next((cell["id"] for cell in row["cells"] if cell["status"] == "done"), None) for row in chosen]
    students = [
        Shown(row["label"], row["student"] or row["teacher"], sheet)
        for row, cell_id in zip(chosen, cells, strict=True)
        if cell_id
        and (sheet := read_sheet(pictures_file(folder_of(output_root, cell_id), row["evaluation"] or "test")))
    ]
    if not students:
        return None
    first = students[-1].sheet  # a taught one's, for a teacher may have been tested on its own data
    every = [*_teachers([each for each in cells if each], output_root), *students]
    alike = [each for each in every if _same_images(each.sheet, first)]
    rule = [f"The first {len(first.pictures)} images of the test set, whatever they show; of each row the first seed."]
    if len(chosen) < len(rows):
        rule.append("Of the rows teachers, untaught students and the paper’s own method.")
    if len(alike) < len(every):
        rule.append(f"Tested on other images, and left out: {', '.join(s.label for s in every if s not in alike)}.")
    lines = []
    for number, picture in enumerate(first.pictures):
        columns = [("image", "", picture.image), ("truth", "", picture.truth)]
        columns += [(each.label, each.network, each.sheet.pictures[number].found) for each in alike]
        shown = [{"label": label, "network": network, "src": _source(pixels)} for label, network, pixels in columns]
        title = f"Image {number + 1}" + (f", {picture.note}" if picture.note else "")
        lines.append({"title": title, "pictures": shown})
    painted = zip(first.names, colours(first.names).tolist(), strict=True)
    classes = [{"name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour)} for name, colour in painted]
    return {"lines": lines, "rule": " ".join(rule), "key": first.key, "classes": classes}


def _teachers(cell_ids: Sequence[str], output_root: str | os.PathLike[str]) -> list[Shown]:
    """The pictures of the teachers of cells, each once, but for those that are among the cells."""
    needed = (result.get("needs", {}).get("teacher") for result in read_results(output_root, cell_ids).values())
    ids = [each for each in dict.fromkeys(needed) if each and each not in cell_ids]
    found = []
    for cell_id, result in read_results(output_root, ids).items():
        if sheet := read_sheet(pictures_file(folder_of(output_root, cell_id))):
            found.append(Shown("teacher", result["config"]["student"]["network"]["name"], sheet))
    return found


def _same_images(one: Sheet, other: Sheet) -> bool:
    pairs = zip(one.pictures, other.pictures, strict=False)
    same = all(np.array_equal(ours.image, theirs.image) for ours, theirs in pairs)
    return same and len(one.pictures) == len(other.pictures)


def _source(pixels: Pixels) -> str:
    """A picture inside a page: as PNG, which is smaller for few colours, or as JPEG, which is for photographs."""
    image = Image.fromarray(pixels)
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((buffer.getvalue(), kind))
    content, kind = min(encoded, key=lambda each: len(each[0]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
