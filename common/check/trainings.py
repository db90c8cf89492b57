"""Check trainings before a run: the weights that they start from, and the state of earlier trainings."""

import argparse
import contextlib
import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd

from common.artifacts.layout import Layout
from common.check.inputs import Seen
from common.check.lines import FAILS, FINE, WARNING, Check, Checks
from common.check.work_folder import existing, why_unwritable
from common.data.exposure import exposure_warning
from common.data.folds import fold_numbers
from common.data.ingest import preprocess_stage
from common.errors import UserError
from common.process.command_line import SEED
from common.recipes import Recipe
from common.train import pretrained
from common.train.checkpoints import made_from
from common.train.distributed import ALONE
from common.train.jobs import Request, plan
from common.train.networks import encoder_of
from common.train.pretrained import start_from
from common.train.published import Published


def weights(args: argparse.Namespace, seen: Seen) -> Checks[None]:
    """Yield for each encoder where its weights are, or whether their host answers."""
    recipes = {recipe.encoder: recipe for recipe in reversed(seen.recipes.values())}
    for _, recipe in sorted(recipes.items()):
        published = encoder_of(recipe.encoder).weights
        if args.pretrained == "auto" and published:
            yield published_weights(recipe, published, args.weights_dir)
            continue
        path = None if args.pretrained in ("auto", "none") else Path(args.pretrained)
        if path and not path.is_file():
            raise UserError(f"--pretrained {path}: no such file")
        yield start(recipe, args.pretrained, path, args=args)


def published_weights(recipe: Recipe, published: Published, folder: Path | None) -> Check:
    """Tell whether an encoder's published weights are on this machine, or can be downloaded."""
    encoder, path = recipe.encoder, pretrained.weight_files(published, folder)[0]
    if found := pretrained.found_file(published, folder):
        return start(recipe, "auto", *found)
    host = next((url for file in published.files for url in file.urls if pretrained.answers(url)), None)
    if host:
        return download_to(path.parent, encoder, host)
    return Check(
        "weights",
        WARNING,
        f"{encoder}: the published weights are not available and their host does not answer, so "
        "training starts from random weights and reaches a much lower score",
        f"save {published.urls[0]} as {path.absolute()}",
    )


def start(
    recipe: Recipe, asked: str, path: Path | None, sha256: str = "", args: argparse.Namespace | None = None
) -> Check:
    """Describe what a training starts from.

    asked : auto, none or a file; path : of the weights, None = random; sha256 : that it should begin with
    args : with them, whether a network of this project has seen validation samples is checked too
    """
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        if path and sha256:
            pretrained.told_if_other(path, sha256)
        if path and args and (layout := Layout(args.work)).folds.is_file():
            pretrained.check_unseen(path, layout.folds, args.folds or fold_numbers(layout.read_folds()))
        found = start_from(recipe, asked, path).describe()
    warning = told.getvalue().strip().removeprefix("warning: ")
    return Check("weights", WARNING if told.getvalue() else FINE, f"{recipe.encoder}: {found}", warning)


def download_to(folder: Path, encoder: str, host: str) -> Check:
    """Tell whether weights from a host can be downloaded to a folder."""
    reason = why_unwritable(existing(folder))
    if reason is None:
        return Check("weights", FINE, f"{encoder}: will be downloaded from {host}")
    return Check(
        "weights",
        FAILS,
        f"{encoder}: would be downloaded to {folder}, which cannot be written ({reason})",
        "free some space, get write permission, give --weights-dir a writable folder, or start from random weights "
        "with --pretrained none",
    )


def work_so_far(args: argparse.Namespace, seen: Seen) -> Checks[None]:
    """Yield which results of an earlier run can be reused, and which trainings would need --force."""
    layout = Layout(args.work, args.data)
    if not layout.samples.is_file():
        return
    if line := exposure_warning(args.work):
        yield Check("work so far", WARNING, f"the stored images: {line.removeprefix('warning: ')}")
    reason = preprocess_stage(args.work, seen.plan).why_stale() or ""
    folds = layout.read_folds() if layout.folds.is_file() else None
    numbers = [] if folds is None else args.folds or fold_numbers(folds)
    begun = [(name, fold) for name, fold in product(seen.recipes, numbers) if made_from(layout.run(name, fold))]
    if folds is not None:
        yield from changed_trainings(layout, folds, seen.recipes, begun)
    trained = ", ".join(f"{name} fold {fold}" for name, fold in begun)
    if "changed" in reason and trained:
        yield Check(
            "work so far",
            WARNING,
            f"stage 01 will run again ({reason}); already trained: {trained}",
            "if images or labels change, these will need --force; another --work keeps them",
        )
    elif trained:
        yield Check("work so far", FINE, f"already begun or trained, to be resumed: {trained}")


def changed_trainings(
    layout: Layout, folds: pd.DataFrame, recipes: dict[str, Recipe], begun: list[tuple[str, int]]
) -> Iterator[Check]:
    """Yield which begun trainings, a recipe and fold each, stage 04 would not resume."""
    for name, fold in begun:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which are up to date
            jobs = plan(Request(layout.work, {name: recipes[name]}, [fold], SEED), folds, ALONE)
        for job in jobs:
            if changes := job.stage.changes(made_from(layout.run(name, fold)) or {}):
                yield Check(
                    "work so far",
                    FAILS,
                    f"{layout.run(name, fold)} was trained on something else ({changes})",
                    f"{layout.command('04_train.py', '--recipe', name, '--folds', fold, '--force')} trains it again; "
                    "or give another --work",
                )
