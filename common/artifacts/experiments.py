"""Runs with names of their own: kept in the work folder, so that a name once given stands wherever a recipe's does."""

from pathlib import Path

from common.artifacts.files import write_json
from common.artifacts.layout import Layout
from common.artifacts.locks import Lock
from common.errors import UserError
from common.experiments import asked_names, read_kept, read_recipes_file
from common.recipes import Experiment, Recipe, check_experiment_name, get_recipes


def read_experiments(layout: Layout) -> dict[str, Experiment]:
    """Return the work folder's experiments by name."""
    return read_kept(layout.experiments)


def add_experiments(layout: Layout, new: dict[str, Experiment]) -> dict[str, Experiment]:
    """Add experiments to the work folder's; returns all of them by name.

    Raises UserError for impossible names and settings, and where a name has a training of another experiment.
    """
    if not new:
        return read_experiments(layout)
    for name in new:
        check_experiment_name(name)
    with Lock(layout.experiments, wait=True):
        known = read_experiments(layout)
        for name, experiment in new.items():
            before = known.get(name, experiment)
            if before != experiment and (layout.runs / name).is_dir():
                raise UserError(
                    f"{name} is {describe(before)} in {layout.work}, not {describe(experiment)}; give another name, or "
                    f"delete {layout.runs / name}"
                )
        merged = {**known, **new}
        get_recipes(list(new), tell=lambda note: None, experiments=merged)  # refuse now what cannot be trained
        if merged != known:
            rows = {name: {"base": each.base, "settings": list(each.settings)} for name, each in sorted(merged.items())}
            write_json(layout.experiments, rows)
    return merged


def describe(experiment: Experiment) -> str:
    """Return an experiment as it is asked for."""
    return " ".join([experiment.base, *experiment.settings])


def asked_recipes(
    layout: Layout, given: list[str] | None, settings: list[str], name: str | None, file: Path | None
) -> dict[str, Recipe]:
    """Return the recipes to train by the name of their run, and keep those with names of their own.

    names : of recipes and experiments; settings : changes of all of them
    name : of the run, for one recipe; file : of further experiments
    """
    listed, names = read_recipes_file(file) if file else {}, asked_names(given, file)
    if name is None:
        return get_recipes(names, settings, experiments=add_experiments(layout, listed))
    if len(names) > 1:
        raise UserError(f"--name {name} is for one --recipe, found {', '.join(names)}")
    get_recipes(names, settings, experiments={**read_experiments(layout), **listed})  # notes on idle settings, once
    experiments = add_experiments(layout, {**listed, name: Experiment(names[0], tuple(settings))})
    return get_recipes([name], tell=lambda note: None, experiments=experiments)
