"""`python -m experiments.run [key=value ...]`: one cell, or with `+table=<name>` a whole table of them.

Exit status: 0 all done, 2 a mistake in the command or the data (one line says which), 3 a cell failed, 130 interrupted.
"""

from __future__ import annotations

import sys

INTERRUPTED = "kt: interrupted; the same command goes on from here"

if __name__ == "__main__":  # before all other imports, which take long enough to be interrupted
    try:
        # By its real name, so that workers of any launcher can import what they are sent.
        from experiments.run import main as run_main

        sys.exit(run_main())
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # what other packages bring is loaded by the imports
        from kt.errors import UserError as Mistake

        if not isinstance(error, Mistake):
            raise
        print(f"kt: error: {error}", file=sys.stderr)
        sys.exit(2)

import argparse
import contextlib
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_automatic_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import cell, lifeline, progress
from experiments.checking import plain
from experiments.groups import CONF, GROUPS, choices
from experiments.meaning import cell_id
from experiments.schema import is_group, sign, with_recipe
from kt.errors import UserError, nearest
from kt.store import evaluation_file, folder_of, read_evaluation, read_result

CONFIG_NAME = "config"
TABLE = "+table="  # as `normalise` leaves it
Outcome = tuple[int, Path | None]  # exit status, and the folder of the one table or sweep that has been rendered
SKIPPED = ("full_key", "object_type", "See https", "To append")  # lines of Hydra's errors that help nobody here


def explain(error: Exception) -> str:
    """One of Hydra's errors in one line."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected key=value ({error.message.splitlines()[0]})"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [name for name in error.options if not name.startswith("_")]
        return f"{group}={choice}: there is no such choice{nearest(choice, options)}; choices: {', '.join(options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for line in (str(error) + "\n" + str(cause or "")).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(SKIPPED))


def normalise(overrides: Sequence[str]) -> list[str]:
    """Overrides in the one form the rest works with: `++key=value` for values, no sign for group choices.

    With `++` Hydra lets every key in, and `experiments.checking` then refuses the wrong ones with a better message. It
    also lets `method.balance=1` through where only some rows of a table have a balance.

    Raises:
        UserError: An override cannot be read or deletes something.
    """
    found = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        line, key = str(override.input_line), override.key_or_group
        if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
            found.append(line)
        elif override.is_delete():
            raise UserError(f"{line}: a key cannot be deleted; set it to null where it may be null")
        elif "/" in key:
            raise UserError(f"{line}: there is no config group {key!r}{nearest(key.split('/')[0], GROUPS)}")
        elif is_group(key.lstrip("+")) and override.value() is None:
            raise UserError(f"{line.lstrip('+')}: expected one of {', '.join(choices(key.split('@')[0]))}")
        else:
            found.append(sign(override.get_key_element().lstrip("+")) + line.lstrip("+"))
    return found


def add_recipe(overrides: Sequence[str]) -> list[str]:
    """Normalised overrides with those that a teacher's own dataset brings along."""
    pairs = {line.lstrip("+").partition("=")[0]: line.partition("=")[2] for line in overrides}
    groups = {key: value for key, value in pairs.items() if is_group(key)}
    values = [line for line in overrides if not is_group(line.lstrip("+").partition("=")[0])]
    return [f"{sign(key)}{key}={value}" for key, value in with_recipe(groups).items()] + values


def isolated(config: dict[str, Any]) -> None:
    """Runs a cell in a child process: joblib's pool dies as a whole when one of its workers is killed.

    Raises:
        CellFailed: The cell failed or its process was killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    worker = os.getpid(), lifeline.started(os.getpid())
    child = os.fork()
    if child == 0:
        status = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)
        lifeline.follow_leader()
        lifeline.follow(*worker)
        # What happened is in the cell's status file.
        with contextlib.suppress(BaseException):
            cell.run_cell(config)
            status = 0
        os._exit(status)
    _, ended = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(ended) != 0:
        raise cell.CellFailed(f"cell {cell_id(config)} failed")


def task(config: DictConfig) -> str | Exception:
    """What every launcher runs: one cell.

    Returns:
        Its id, or the error that its status file has too; Hydra would bury a raised one.
    """
    try:
        return _task(config)
    except (UserError, cell.CellFailed) as error:
        return error


def _task(config: DictConfig) -> str:
    values = plain(config)
    launcher = HydraConfig.get().launcher._target_
    parallel = not launcher.endswith("BasicLauncher")
    if parallel:
        lifeline.follow_leader()
    if parallel or not cell.is_first():
        progress.use(progress.Display(quiet=True))
    if "joblib" in launcher and HydraConfig.get().mode == RunMode.MULTIRUN:
        isolated(values)
        return cell_id(values)
    if launcher.endswith("SlurmLauncher"):
        from experiments.slurm import interruptible

        with interruptible():
            return str(cell.run_cell(values)["id"])
    return str(cell.run_cell(values)["id"])


def _refuse_sweep(overrides: Sequence[str], advice: str) -> None:
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            line = str(override.input_line).lstrip("+")
            raise UserError(f"{line}: several values make a sweep; {advice}")


def _show(hydra: Hydra, arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`--cfg`: the composed config, checked first."""
    _refuse_sweep(overrides, "--cfg shows the config of one cell")
    config = hydra.compose_config(CONFIG_NAME, list(overrides), RunMode.RUN, validate_sweep_overrides=False)
    plain(config)
    hydra.show_cfg(CONFIG_NAME, list(overrides), arguments.cfg, arguments.package, arguments.resolve)


def _value(job: JobReturn) -> str:
    """The id of the cell that a job has run; raises the error that it has returned."""
    value = job.return_value
    if isinstance(value, Exception):
        raise value
    return str(value)


def _run_one(hydra: Hydra, overrides: list[str]) -> int:
    """One cell, without a table."""
    from experiments.meaning import lenient
    from experiments.plan import jobs_of, plan_lines
    from experiments.rehearse import rehearse

    _refuse_sweep(overrides, "add -m, or +table=<name> for the rows of a table")
    config = plain(hydra.compose_config(CONFIG_NAME, list(overrides), RunMode.RUN))
    for key in ("rows", "role"):
        if config[key] is not None:
            tables = ", ".join(choices("table"))
            raise UserError(f"{key}={config[key]}: selects rows of a table; add +table=<name> (one of {tables})")
    if config["settings"]:
        raise UserError("settings=true: tells of the rows of a table; add +table=<name>")
    if config["plan"]:
        print("\n".join(plan_lines(jobs_of(config), config["output_root"], 1)))
        return 0
    cell.check_writable(config["output_root"])
    if config["rehearse"]:
        with lenient(True):
            jobs = [*jobs_of(config).values()]
        name = config["table"]["name"] or jobs[-1].id
        return rehearse(name, jobs, config["rehearse"], config["output_root"], config["scale"]["name"])
    cell_id = _value(hydra.run(CONFIG_NAME, task, [*overrides, "hydra.mode=RUN"]))
    result = read_result(folder_of(config["output_root"], cell_id))
    if cell.is_first() and result is not None:
        metrics = ", ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
        folder = folder_of(config["output_root"], cell_id)
        print(f"{metrics} after {result['seconds']:.0f} s: {folder}")
        name = config["evaluation"]
        if name is not None and (scores := read_evaluation(folder, name)) is not None:
            numbers = (f"{key} {value:.2f}" for key, value in scores.items() if isinstance(value, int | float))
            print(f"evaluation={name}: {', '.join(numbers)}; all of it: {evaluation_file(folder, name)}")
    return 0


def named_tables(overrides: Sequence[str]) -> list[str]:
    """The tables that normalised overrides ask for, `all` and lists of them spelt out.

    Raises:
        UserError: There is none of a name.
    """
    known = choices("table")
    given = [name for line in overrides if line.startswith(TABLE) for name in line.removeprefix(TABLE).split(",")]
    names = [name for each in given for name in (known if each == "all" else (each,))]
    for name in names:
        if name.startswith("["):
            asked = ",".join(given)
            raise UserError(f"table={asked}: write +table={asked.strip('[]')}")
        if name not in known:
            raise UserError(
                f"table={name}: there is no such table{nearest(name, known)}; choices: all, {', '.join(known)}"
            )
    return list(dict.fromkeys(names))


def without_table(overrides: Sequence[str]) -> list[str]:
    """The other ones of normalised overrides."""
    return [line for line in overrides if not line.startswith(TABLE)]


def _run_each(names: Sequence[str], arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Outcome:
    """Several tables, one after the other, sharing cells; what keeps one from running stops no other."""
    from tables.summary import Ran, summarise

    others = without_table(normalise(arguments.overrides))
    ran = []
    for name in names:
        started, error, folder = time.monotonic(), "", None
        try:
            arguments.overrides = [*others, TABLE + name]
            status, folder = dispatch(arguments, parser)
        except (UserError, HydraException, OmegaConfBaseException) as found:
            error, status = explain(found), 2
        if status == 130:
            return status, None
        ran.append(Ran(name, status, time.monotonic() - started, error, folder))
    if cell.is_first():
        summarise(ran)
    return max(each.status for each in ran), None


def dispatch(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Outcome:
    """Does what the command line asks for."""
    version.setbase("1.3")
    overrides = normalise(arguments.overrides)
    if arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
        arguments.overrides = overrides
        _run_hydra(arguments, parser, task, str(CONF), CONFIG_NAME)
        return 0, None
    tables = named_tables(overrides)
    if len(tables) > 1:
        if arguments.cfg:
            raise UserError(f"table={','.join(tables)}: --cfg shows the config of one table")
        return _run_each(tables, arguments, parser)
    search_path = create_automatic_config_search_path(None, None, str(CONF))
    hydra = Hydra.create_main_hydra2("run", search_path)
    try:
        if tables:
            overrides = [*without_table(overrides), TABLE + tables[0]]  # it may have been named twice
        else:
            overrides = add_recipe(overrides)
        if arguments.cfg:
            _show(hydra, arguments, overrides)
            return 0, None
        single, multirun = (
            any(re.fullmatch(rf"\+*hydra\.mode={mode}", line) for line in overrides) for mode in ("RUN", "MULTIRUN")
        )
        if tables and not single:
            status, folder = hydra.multirun(CONFIG_NAME, task, [*overrides, "hydra.mode=MULTIRUN"])
            return status, folder
        if arguments.multirun or multirun:
            if not any(line.startswith("hydra/sweeper=") and line != "hydra/sweeper=table" for line in overrides):
                swept = [*overrides, "hydra.mode=MULTIRUN", "hydra/sweeper=table"]
                status, folder = hydra.multirun(CONFIG_NAME, task, swept)
                return status, folder
            master = hydra.compose_config(CONFIG_NAME, list(overrides), RunMode.MULTIRUN)
            cell.check_writable(master.output_root)
            for batch in hydra.multirun(CONFIG_NAME, task, [*overrides, "hydra.mode=MULTIRUN"]):
                for job in batch:
                    _value(job)
            return 0, None
        return _run_one(hydra, overrides), None
    finally:
        GlobalHydra.instance().clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; every mistake of the user ends in one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    parser = get_args_parser()
    try:
        with lifeline.interruptible():
            return dispatch(parser.parse_args(argv), parser)[0]
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except UserError as error:
        message, status = " ".join(str(error).split()), 2
    except cell.CellFailed as error:
        message, status = str(error), 3
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        message, status = explain(error), 2
    if cell.is_first():
        print(f"kt: error: {message}", file=sys.stderr)
    return status
