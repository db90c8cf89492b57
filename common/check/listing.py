"""What a training will do: the recipes side by side, and a fold's class weights."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.classes import CLASS_NAMES, N_CLASSES
from common.data.class_weights import effective_number_weights, effective_numbers
from common.data.folds import class_counts
from common.errors import UserError
from common.process.progress import progress
from common.recipes import RECIPES, TIMM_PREFIX, Recipe, to_dict
from common.train.networks import ENCODERS, build_model, count_parameters, encoder_of
from common.train.pretrained import found_file
from common.train.schedules import schedule_of
from common.train.timm_encoders import matching, sizes_of


def recipe_table() -> pd.DataFrame:
    """Return the recipes as a table for people, a row each, with their number of parameters."""
    return pd.DataFrame([{"recipe": name, **describe(recipe)} for name, recipe in RECIPES.items()])


def describe(recipe: Recipe) -> dict:
    with torch.device("meta"):
        model = build_model(recipe, N_CLASSES)
    pooled = next(layer for layer in model.head if isinstance(layer, torch.nn.Linear)).in_features
    return {
        "encoder": recipe.encoder,
        "pooling": f"{recipe.pooling} -> {pooled}",
        "buffers (dropout)": ", ".join(
            f"{width} ({dropout:g})" for width, dropout in zip(recipe.buffers, recipe.dropouts, strict=True)
        )
        or "-",
        "crop of image": f"{recipe.crop} of {recipe.size if recipe.size_rule == 'fixed' else recipe.store}",
        "batch": recipe.batch_size,
        "learning rates": ", ".join(f"{rate:.2g}" for rate in recipe.group_learning_rates),
        "at most": schedule_of(recipe).describe(recipe),
        "weight decay": f"{recipe.weight_decay:g}" + (f", L1 {recipe.l1:g}" if recipe.l1 else ""),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def recipe_records() -> list[dict]:
    """Return every field of every recipe and its number of parameters, for programs."""
    return [
        {"recipe": name, "parameters": count_parameters(recipe, N_CLASSES), **to_dict(recipe)}
        for name, recipe in RECIPES.items()
    ]


def recipe_listing(as_json: bool) -> str:
    """Return every recipe with its number of parameters, as text."""
    return json.dumps(recipe_records(), indent=1) if as_json else recipe_table().to_string(index=False)


def encoder_listing(pattern: str, weights_dir: Path | None) -> str:
    """Return the encoders whose names match a pattern as text: parameters, image sizes, weights. Raises UserError.

    pattern : with * and ?, or a part of the name; empty for those of this project
    weights_dir : folder of published weights
    """
    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = [name for name in ENCODERS if fnmatchcase(name, wanted)]
    if pattern:
        names += matching(wanted)
    if not names:
        raise UserError(f"no encoder matches {pattern!r}; give a part of its name, or a pattern such as '*vit*224'")
    rows = [encoder_row(name, weights_dir) for name in progress(names, len(names), "encoders", "encoders")]
    lines = [pd.DataFrame(rows).to_string(index=False)]
    if not pattern:
        lines.append(f"timm has more: {TIMM_PREFIX}NAME is any of its networks; --list-encoders PATTERN lists them")
    return "\n".join(lines)


def encoder_row(name: str, weights_dir: Path | None) -> dict:
    """Return what `encoder_listing` says of an encoder."""
    row = {"encoder": name, "parameters": "-", "images": "any", "published": "-", "on this machine": "-"}
    try:
        with torch.device("meta"):
            encoder, _ = encoder_of(name).build()
        row["parameters"] = str(sum(parameter.numel() for parameter in encoder.parameters()))
        row["images"] = sizes_of(name) if name.startswith(TIMM_PREFIX) else "any"
    except UserError:
        return {**row, "images": "none: it cannot serve"}
    if published := encoder_of(name).weights:
        found = found_file(published, weights_dir)
        row |= {"published": published.file, "on this machine": str(found[0]) if found else "-"}
    return row


def class_weight_listing(recipes: dict[str, Recipe], folds: pd.DataFrame, numbers: list[int]) -> str:
    """Return the E-loss's weight of each class, for each recipe and fold, as text."""
    return "\n\n".join(
        f"{name} fold {fold}: alpha {recipe.alpha:g}, weights {recipe.class_weights}, on the {recipe.weighted_part} of "
        "each class\n" + class_weight_table(class_counts(folds, fold), recipe).to_string(index=False)
        for name, recipe in recipes.items()
        for fold in numbers
    )


def class_weight_table(counts: np.ndarray, recipe: Recipe) -> pd.DataFrame:
    """Return the E-loss weights of a training fold: samples n, effective number Q_n, weight used, weight of eq. 6.

    counts : (n_classes,) distinct training samples
    """
    return pd.DataFrame(
        {
            "class": CLASS_NAMES,
            "n": counts,
            "Q_n": effective_numbers(counts, recipe.alpha).round(2),
            "weight": effective_number_weights(counts, recipe.alpha, recipe.class_weights).round(4),
            "1/Q_n": effective_number_weights(counts, recipe.alpha, "raw").round(5),
        }
    )
