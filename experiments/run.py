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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import version as hydra_version
from hydra._internal.grammar.utils import escape_special_characters
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_automatic_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import cell, lifeline, progress
from experiments.checking import plain
from experiments.completion import complete
from experiments.groups import CONF, GROUPS, choices
from experiments.help import help_of, overview, version
from experiments.idle import idle_alone, reason, told, unread
from experiments.meaning import cell_id
from experiments.mirror import go_offline
from experiments.schema import is_group, other_length, sign, with_recipe
from kt import command
from kt.errors import Failure, Parser, UserError, nearest
from kt.files import at_home
from kt.store import evaluation_file, folder_of, read_result, read_status
from tables.summary import scores_in_words

CONFIG_NAME = "config"
TABLE = "+table="  # as `normalise` leaves it
UNREAD = ("config_path", "config_name", "config_dir", "experimental_rerun")  # options of Hydra's
SKIPPED = ("full_key", "object_type", "See https", "To append")  # lines of Hydra's errors that help nobody here


def explain(error: Exception) -> str:
    """One of Hydra's errors in one line."""
    if isinstance(error, OverrideParseException):
        reason = error.message.splitlines()[0]
        return f"{error.override}: expected key=value, or \"key='value'\" where that has strange signs ({reason})"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [name for name in error.options if not name.startswith("_")]
        return f"{group}={choice}: there is no such choice{nearest(choice, options)}; choices: {', '.join(options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for line in (str(error) + "\n" + str(cause or "")).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(SKIPPED)).replace("override ++", "override ")


def normalise(overrides: Sequence[str]) -> list[str]:
    """Overrides in the one form the rest works with: `++key=value` for values, no sign for group choices.

    With `++` Hydra lets every key in, and `experiments.checking` then refuses the wrong ones with a better message. It
    also lets `method.balance=1` through where only some rows of a table have a balance.

    Raises:
        UserError: An override cannot be read or deletes something.
    """
    found = []
    for override in map(_parsed, overrides):
        line, key = str(override.input_line), override.key_or_group
        if not key or key == "hydra":
            raise UserError(f"{line}: expected {key}{'.<key>' if key else 'key'}=value")
        if key.lstrip("+") != "table" and (is_group(key.lstrip("+")) or "/" in key) and not override.is_delete():
            _check_choice(override)
        if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
            found.append(line)
        elif override.is_delete():
            raise UserError(f"{line}: a key cannot be deleted; set it to null where it may be null")
        elif "/" in key:
            raise UserError(f"{line}: there is no config group {key!r}{nearest(key.split('/')[0], GROUPS)}")
        else:
            found.append(sign(override.get_key_element().lstrip("+")) + line.lstrip("+"))
    return found


_HOME = re.compile(r"(?:(?<==)|(?<=,))~\w*(?=[/,]|$)")  # of a user, where a value begins


def _expanded(home: re.Match[str]) -> str:
    """A folder of a user's, as Hydra's parser takes it."""
    found = os.path.expanduser(home[0])
    return escape_special_characters(found) if found != home[0] else found


def _parsed(line: str) -> Override:
    """An override; one that Hydra's parser cannot take at all is a mistake like others."""
    try:
        return OverridesParser.create().parse_overrides([_HOME.sub(_expanded, line)])[0]
    except (ValueError, RecursionError) as error:  # Python converts no number of more than 4300 digits
        raise UserError(f"{line[:40]}...: cannot be read ({error})") from None


def _check_choice(override: Override) -> None:
    """Refuses what names no choice of a group: other values than words, and paths out of the group's folder."""
    value = override.value()
    for each in value.list if isinstance(value, ChoiceSweep) else [value]:
        word = each.text if isinstance(each, QuotedString) else each
        if isinstance(word, Glob) or (isinstance(word, str) and ".." not in word.split("/")):
            continue
        group = override.key_or_group.lstrip("+").split("@")[0]
        expected = f"one of {', '.join(choices(group))}" if group in GROUPS else "the name of a choice"
        raise UserError(f"{str(override.input_line).lstrip('+')}: expected {expected}")


def add_recipe(overrides: Sequence[str]) -> list[str]:
    """Normalised overrides with what they bring along: a teacher's own dataset its recipe, a length no other one."""
    pairs = {line.lstrip("+").partition("=")[0]: line.partition("=")[2] for line in overrides}
    groups = {key: value for key, value in pairs.items() if is_group(key)}
    values = [line for line in overrides if not is_group(line.lstrip("+").partition("=")[0])]
    ended = {other for key, value in pairs.items() if value != "null" and (other := other_length(key))} - pairs.keys()
    return [
        *(f"{sign(key)}{key}={value}" for key, value in with_recipe(groups).items()),
        *values,
        *(f"++{key}=null" for key in sorted(ended)),
    ]


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
    except (UserError, Failure) as error:
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


def _help(hydra: Hydra, arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`--help`: of everything, or of the choices that the command line makes."""
    _refuse_sweep(arguments.overrides, "--help tells of one choice")
    pairs = [line.lstrip("+").partition("=") for line in arguments.overrides]
    values = plain(hydra.compose_config(CONFIG_NAME, overrides, RunMode.RUN))
    print("\n".join(help_of(values, {key: choice for key, _, choice in pairs if key in GROUPS})))


def _value(job: JobReturn) -> str:
    """The id of the cell that a job has run; raises the error that it has returned."""
    value = job.return_value
    if isinstance(value, Exception):
        raise value
    return str(value)


def _run_one(hydra: Hydra, overrides: list[str]) -> int:
    """One cell, without a table."""
    from experiments.meaning import lenient
    from experiments.plan import in_words, jobs_of, plan_lines
    from experiments.rehearse import rehearse

    _refuse_sweep(overrides, "add -m, or +table=<name> for the rows of a table")
    composed = hydra.compose_config(CONFIG_NAME, list(overrides), RunMode.RUN)
    config = plain(composed)
    for key in ("rows", "role"):
        if config[key] is not None:
            tables = ", ".join(choices("table"))
            raise UserError(f"{key}={config[key]}: selects rows of a table; add +table=<name> (one of {tables})")
    without_effect = idle_alone(config) | unread(composed)
    for line in overrides:
        key, _, value = line.lstrip("+").partition("=")
        if why := reason(key, without_effect):
            raise UserError(told(key, value, why))
    if config["settings"]:
        raise UserError("settings=true: tells of the rows of a table; add +table=<name>")
    if config["plan"]:
        print("\n".join(plan_lines(jobs_of(config), config["output_root"], 1)))
        return 0
    if config["rehearse"] or not Path(config["output_root"]).is_dir():  # what is done needs no place to write to
        cell.check_writable(config["output_root"])
    if config["rehearse"]:
        with lenient(True):
            jobs = [*jobs_of(config).values()]
        name = config["table"]["name"] or jobs[-1].id
        return rehearse(name, jobs, config["rehearse"], config["output_root"], config["scale"]["name"])
    if config["wandb"]["mode"] == "online":
        jobs = [job for job in jobs_of(config).values() if not job.is_done]
        go_offline(jobs, progress.current())
        overrides = [*overrides, *(jobs[-1].overrides if jobs else ())]
    began = time.time()
    folder = folder_of(config["output_root"], _value(hydra.run(CONFIG_NAME, task, [*overrides, "hydra.mode=RUN"])))
    result = read_result(folder)
    if cell.is_first() and result is not None:
        finished, seconds = read_status(folder).get("finished") or 0.0, in_words(result["seconds"])
        done = time.strftime("%Y-%m-%d %H:%M", time.localtime(finished))
        print("\n".join(scores_in_words(folder, config["evaluation"])))
        if config["evaluation"] is not None:
            print(f"all of it: {evaluation_file(folder, config['evaluation'])}")
        print(f"trained in {seconds}" if finished > began else f"trained nothing: done on {done} in {seconds}")
        print(folder)
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


def _run_tables(hydra: Hydra, named: Mapping[str, Sequence[str]]) -> int:
    """Tables and sweeps, which share cells and workers; what keeps one of several from running stops no other.

    Args:
        hydra: Composes them.
        named: Name -> overrides.

    Returns:
        The exit status.
    """
    from experiments.runs import Run, Training, show_plans
    from tables.summary import Ran, summarise

    began = time.monotonic()
    runs: list[Run] = []
    ran: dict[str, Ran] = {}
    for name, overrides in named.items():
        status, error = 2, ""
        try:
            found = hydra.multirun(CONFIG_NAME, task, [*overrides, "hydra.mode=MULTIRUN"])
            if isinstance(found, Run):
                runs.append(found)
                continue
            status = found  # of what needs no training
        except (UserError, HydraException, OmegaConfBaseException) as mistake:
            if len(named) == 1:
                raise
            error = explain(mistake)
        except Failure as failure:
            if len(named) == 1:
                raise
            status, error = 3, str(failure)
        ran[name] = Ran(name, status, time.monotonic() - began, error, None)
    if runs and runs[0].master.plan:
        if cell.is_first():
            show_plans(runs)
        ran |= {run.table.name: Ran(run.table.name, 0, time.monotonic() - began, "", None) for run in runs}
    elif runs:
        for each in ran.values():  # before what may take hours
            if each.error and cell.is_first():
                print(f"kt: not run: {each.name}: {' '.join(each.error.split())}", file=sys.stderr)
        ran |= {each.name: each for each in Training(runs, began).run()}
    if len(named) > 1:
        if cell.is_first() and not (len(runs) == len(named) and runs[0].master.plan):
            summarise([ran[name] for name in named])
    elif error := (alone := next(iter(ran.values()))).error:
        raise (UserError if alone.status == 2 else Failure)(error)
    return max(each.status for each in ran.values())


def dispatch(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Does what the command line asks for; returns the exit status."""
    hydra_version.setbase("1.3")
    if arguments.shell_completion:
        complete(arguments.overrides)
        return 0
    overrides = normalise(arguments.overrides)
    if not (overrides or arguments.cfg or arguments.help or arguments.hydra_help or arguments.info):
        if cell.is_first():
            print("\n".join(overview()))
        return 0
    if arguments.hydra_help or arguments.info:
        arguments.overrides = overrides
        _run_hydra(arguments, parser, task, str(CONF), CONFIG_NAME)
        return 0
    for flag in ("package", "resolve"):
        if getattr(arguments, flag) and not arguments.cfg:
            raise UserError(f"--{flag}: has no effect without --cfg")
    for option in UNREAD:
        if (given := getattr(arguments, option)) is not None:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag}={given}: has no effect here; the configs are those of {CONF}")
    tables = named_tables(overrides)
    if len(tables) > 1 and (arguments.cfg or arguments.help):
        raise UserError(f"table={','.join(tables)}: --cfg and --help tell of one table")
    search_path = create_automatic_config_search_path(None, None, str(CONF))
    hydra = Hydra.create_main_hydra2("run", search_path)
    try:
        if not tables:
            overrides = add_recipe(overrides)
        named = {name: [*without_table(overrides), TABLE + name] for name in tables}
        if len(named) == 1:
            (overrides,) = named.values()
        if arguments.cfg:
            _show(hydra, arguments, overrides)
            return 0
        if arguments.help:
            _help(hydra, arguments, without_table(overrides))
            return 0
        single, multirun = (
            any(re.fullmatch(rf"\+*hydra\.mode={mode}", line) for line in overrides) for mode in ("RUN", "MULTIRUN")
        )
        if named and not single:
            return _run_tables(hydra, named)
        if arguments.multirun or multirun:
            if not any(line.startswith("hydra/sweeper=") and line != "hydra/sweeper=table" for line in overrides):
                return _run_tables(hydra, {"": [*overrides, "hydra/sweeper=table"]})
            master = hydra.compose_config(CONFIG_NAME, list(overrides), RunMode.MULTIRUN)
            cell.check_writable(at_home(master.output_root))
            for batch in hydra.multirun(CONFIG_NAME, task, [*overrides, "hydra.mode=MULTIRUN"]):
                for job in batch:
                    _value(job)
            return 0
        return max(_run_one(hydra, each) for each in named.values() or [overrides])
    finally:
        GlobalHydra.instance().clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; every mistake of the user ends in one line on stderr."""
    parser = get_args_parser()
    parser.error = Parser.error.__get__(parser)  # type: ignore[method-assign]

    def run() -> int:
        try:
            if "--version" in (sys.argv[1:] if argv is None else argv):
                print(version())
                return 0
            with lifeline.interruptible():
                return dispatch(parser.parse_args(argv), parser)
        except KeyboardInterrupt as error:
            print(f"kt: interrupted; {error}" if str(error) else INTERRUPTED, file=sys.stderr)
            return 130
        except (HydraException, OmegaConfBaseException) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise UserError(explain(error)) from None

    return command.run(run, cell.is_first)
