"""`python tests/campaign.py --minutes 30`: the cases of `fuzz` with ever new seeds, until the time is up.

Beside command lines and data these are spoilt checkpoints and spoilt results of cells. A fault says its case; `--only
line:17` tries that again. Exit status: 0 no fault, 1 some.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fuzz  # noqa: E402
import torch  # noqa: E402

import fake_training  # noqa: E402
from kt.classifier import Classifier  # noqa: E402
from kt.errors import Parser, UserError  # noqa: E402
from kt.models import build_network  # noqa: E402
from kt.models.checkpoints import load_weights  # noqa: E402
from results import make_row, write_cell  # noqa: E402
from tables.__main__ import run as run_tables  # noqa: E402
from tables.render import write_table  # noqa: E402

TABLE = "imagenet_compression"


def fault_of_checkpoint(seed: int, root: Path) -> str | None:
    """What is wrong with how a spoilt file of weights is read."""
    rng, path = random.Random(seed), root / "weights.pth"
    network = Classifier(build_network("resnet8", num_classes=10))
    torch.save(network.network.state_dict(), path)
    content, kind = path.read_bytes(), rng.choice([*fuzz.NO_FILE, "flipped"])
    path.write_bytes({**fuzz.NO_FILE, "flipped": fuzz.flipped}[kind](content, rng))
    try:
        with fuzz.limited():
            load_weights(network.network, path, "teacher.checkpoint")
        return f"checkpoint {seed} {kind}: is read" if kind != "flipped" else None
    except UserError as error:
        return f"checkpoint {seed} {kind}: {str(error)[:200]!r}" if "\n" in str(error) else None
    except Exception as error:
        return f"checkpoint {seed} {kind}: {fuzz.told(error)}"


def fault_of_result(seed: int, root: Path) -> str | None:
    """What is wrong with how a table is rendered after one of its files, or of its cells', has been spoilt."""
    rng = random.Random(seed)
    place = root / f"results-{seed}"
    rows = [make_row(TABLE, name) for name in ("baseline", "kd", "at")]
    for row in rows:
        write_cell(place, row["cells"][0]["id"], {"top1": 50.0, "top5": 80.0})
    write_table(TABLE, rows, place, "mini", "scenes")
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.suffix != ".png")
    path = rng.choice(files)
    kinds = {**fuzz.NO_FILE, "flipped": fuzz.flipped, "changed": fuzz.changed}
    kind = rng.choice([*kinds])
    content = path.read_bytes()
    if not content or (kind == "changed" and not isinstance(_parsed(content), dict)):
        return None
    path.write_bytes(kinds[kind](content, rng))
    try:
        with fuzz.limited(), open(os.devnull, "w", encoding="utf-8") as nowhere:
            before, sys.stdout = sys.stdout, nowhere
            try:
                run_tables([TABLE, "--output-root", str(place)])
            finally:
                sys.stdout = before
    except UserError as error:
        return f"result {seed} {path.name} {kind}: {str(error)[:200]!r}" if "\n" in str(error) else None
    except Exception as error:
        return f"result {seed} {path.relative_to(place)} {kind}: {fuzz.told(error)}"
    return None


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


CASES: dict[str, Callable[[int, Path], str | None]] = {
    "line": fuzz.fault_of_line,
    "file": fuzz.fault_of_file,
    "checkpoint": fault_of_checkpoint,
    "result": fault_of_result,
}


def main() -> int:
    """Runs the campaign."""
    parser = Parser("tests/campaign.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1000, help="of the first case; the tests' own begin at 0")
    parser.add_argument("--only", help="one case, such as line:17")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.chdir(root)
        renderers = {name: sys.modules[name] for name in ("tables.render",)}
        sys.modules.update(fake_training.modules() | renderers)  # whatever a command line says, nothing is trained
        if options.only:
            kind, _, seed = options.only.partition(":")
            print(CASES[kind](int(seed), root) or "no fault")
            return 0
        tried, faults, end = Counter[str](), [], time.monotonic() + 60 * options.minutes
        seed = options.seed
        while time.monotonic() < end:
            for kind, case in CASES.items():
                tried[kind] += 1
                if fault := case(seed, root):
                    faults.append(fault)
                    print(fault, flush=True)
            seed += 1
    told = ", ".join(f"{count} {kind}s" for kind, count in tried.items())
    print(f"{told} in {options.minutes:g} minutes: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as mistake:
        print(f"kt: error: {mistake}", file=sys.stderr)
        sys.exit(2)
