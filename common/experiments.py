"""Files of experiments: runs with their own names, a table each."""

import json
import tomllib
from pathlib import Path
from typing import Any

from common.errors import UserError, nearest
from common.recipes import DEFAULT, Experiment, check_experiment_name


def read_recipes_file(path: Path) -> dict[str, Experiment]:
    """Return the experiments of a TOML file: a table each, with `base` and the changed fields."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing; expected a TOML file with a table per run: [name], base = ..., field = ..."
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML ({error})") from None
    experiments = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(table.get("base"), str):
            hint = f"; {nearest('base', table)}" if isinstance(table, dict) and table else ""
            raise UserError(f'{path}: {name} has no base; expected a table [{name}] with base = "RECIPE"{hint}')
        settings = (f"{field}={setting_text(value)}" for field, value in table.items() if field != "base")
        experiments[name] = Experiment(table["base"], tuple(settings))
    if not experiments:
        raise UserError(f"{path} has no runs; expected a table per run: [name], base = ..., field = ...")
    return experiments


def read_kept(path: Path) -> dict[str, Experiment]:
    """Return the experiments that stages 01 and 04 have kept in a work folder; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: Experiment(row["base"], tuple(map(str, row["settings"]))) for name, row in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{path} is not a list of runs as stages 01 and 04 write it; delete it and give --recipes-file or --name again"
        ) from None
    for name in kept:
        check_experiment_name(name)
    return kept


def asked_names(names: list[str] | None, file: Path | None) -> list[str]:
    """Return the names of the recipes to use: those given, else all of the file, else the default."""
    return names or list(read_recipes_file(file) if file else DEFAULT)


def setting_text(value: Any) -> str:
    """Return a TOML value as --set takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
