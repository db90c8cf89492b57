"""Runs of a work folder side by side: their progress, the settings in which they differ, and their scores."""

import re
from functools import partial

import pandas as pd

from common.artifacts.files import read_json
from common.errors import UserError
from common.experiments import setting_text
from common.recipes import Recipe, to_dict
from common.report.page import Table, section
from common.report.reader import Work, speed_and_memory
from common.score.compare import run_facts, span


def run_table(work: Work) -> pd.DataFrame:
    """Return a row per run: its folds, epochs, best macro F1 (mean of the folds), time, memory, device, and settings.

    Settings are those that are not the same in all runs that have finished a fold.
    """
    recipes = {name: recipe for name in work.runs if (recipe := recipe_of(work, name))}
    settings = differing_settings(recipes)
    rows = []
    for name, logs in work.runs.items():
        records = {fold: work.run_record(name, fold) for fold in logs}
        finished = [fold for fold, record in records.items() if record]
        epochs = list(dict.fromkeys(work.run_epochs(name, fold) for fold in logs))
        best = [log["macro_f1"].max() for log in logs.values() if "macro_f1" in log]
        seconds = sum(log.reindex(columns=["seconds", "valid_seconds"]).sum().sum() for log in logs.values())
        rows.append(
            {
                "run": name,
                "finished folds": ",".join(map(str, finished)) or "none",
                "begun": ",".join(str(fold) for fold in logs if fold not in finished) or "-",
                "epochs": ", ".join(epochs),
                "macro F1": sum(best) / len(best) if best else float("nan"),
                "minutes": seconds / 60,
                **speed_and_memory(logs.values()),
                "device": ", ".join(dict.fromkeys(device_of(record) for record in records.values() if record)) or "-",
                "started": ", ".join(dict.fromkeys(start_of(record) for record in records.values() if record)) or "-",
                "settings": settings.get(name, "-"),
            }
        )
    return pd.DataFrame(rows)


def recipe_of(work: Work, name: str) -> Recipe | None:
    """Return the recipe of a run's first finished fold."""
    return next((recipe for fold in work.runs[name] if (recipe := work.run_recipe(name, fold))), None)


def device_of(record: dict) -> str:
    """Return what a finished training ran on."""
    hardware = record.get("hardware", {})
    return f"{hardware['device']}, {hardware.get('precision', '?')}" if hardware.get("device") else "unknown"


def start_of(record: dict) -> str:
    """Return what a finished training started from, without its fold and details."""
    return re.split(r" fold \d+|,| \(", record.get("start", "unknown"))[0]


def differing_settings(recipes: dict[str, Recipe]) -> dict[str, str]:
    """Return for each run its values of the fields that are not the same in all of them, as --set takes them."""
    values = {name: to_dict(recipe) for name, recipe in recipes.items()}
    fields = [field for field in to_dict(Recipe()) if len({str(value[field]) for value in values.values()}) > 1]
    return {
        name: " ".join(f"{field}={setting_text(value[field])}" for field in fields) or "-"
        for name, value in values.items()
    }


def run_listing(work: Work) -> str:
    """Return the table of runs as text."""
    formats = {"macro F1": "{:.3f}", "minutes": "{:.1f}", "images/s": "{:.1f}", "memory, MiB": "{:.0f}"}
    formatters = {name: partial(shown, form) for name, form in formats.items()}
    return run_table(work).to_string(index=False, formatters=formatters)


def shown(form: str, value: float) -> str:
    """Return a number as text; "-" if a log does not have it."""
    return "-" if pd.isna(value) else form.format(value)


@section("Comparison", "Runs scored on the samples that all of them predicted out of fold.")
def comparison(work: Work) -> list:
    path = work.layout.comparison
    if not path.is_file():
        again = work.layout.command("06_thresholds.py", "--compare", "RUN,RUN")
        raise UserError(f"No runs have been compared; run: {again}")
    found = read_json(path)
    runs = pd.DataFrame(
        {
            "run": run["name"],
            "macro F1": run["macro_f1"],
            "95 % interval": span(run["interval"]),
            "classes won": run["wins"],
            "trained on": run_facts(work.layout, run["name"]),
        }
        for run in found["runs"]
    )
    differences = pd.DataFrame(
        {
            "difference": f"{row['a']} - {row['b']}",
            "macro F1": row["difference"],
            "95 % interval": span(row["interval"], "+"),
            "classes won": f"{row['a_wins']} to {row['b_wins']}",
        }
        for row in found["differences"]
    )
    return [
        Table(
            "Runs",
            runs,
            f"{found['n_samples']} samples, {found['method']} thresholds found on other samples. A class is won by the "
            "run that is better than all others.",
            {"macro F1": ".3f"},
        ),
        Table(
            "Paired differences",
            differences,
            "All runs are scored on the same draws of samples. A difference whose interval contains 0 may be chance.",
            {"macro F1": "+.3f"},
        ),
    ]
