"""What a training is going to do, before it does it: the recipes side by side, and a fold's class weights."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from common.classes import CLASS_NAMES, N_CLASSES
from common.losses import effective_number_weights, effective_numbers
from common.models import build_encoder, count_parameters
from common.recipes import RECIPES, Recipe, to_dict


def recipe_table() -> pd.DataFrame:
    """Return the recipes as a table for reading, one row each, with the parameters of each network."""
    return pd.DataFrame([{"recipe": name, **describe(recipe)} for name, recipe in RECIPES.items()])


def describe(recipe: Recipe) -> dict:
    with torch.device("meta"):
        features = build_encoder(recipe)[1]
    pooled = {"acp": f"{features} -> {2 * features}", "average": f"{features}", "own": f"own, {features}"}[recipe.pooling]
    lengths = f"{recipe.max_cycles} of {recipe.cycle_epochs} epochs"
    schedule = {"cycles": lengths, "plateau": f"halves on plateau, {recipe.max_cycles * recipe.cycle_epochs} epochs",
                "constant": f"constant, {recipe.max_cycles * recipe.cycle_epochs} epochs"}[recipe.schedule]
    return {"encoder": recipe.encoder, "features -> pooled": pooled,
            "buffers (dropout)": ", ".join(f"{width} ({dropout:g})" for width, dropout in
                                           zip(recipe.buffers, recipe.dropouts, strict=True)) or "-",
            "crop of image": f"{recipe.crop} of {recipe.size}", "batch": recipe.batch_size,
            "learning rates": ", ".join(f"{rate:.2g}" for rate in recipe.group_learning_rates),
            "at most": schedule, "parameters": count_parameters(recipe, N_CLASSES)}


def recipe_records() -> list[dict]:
    """Return every field of every recipe and its number of parameters, for programs."""
    return [{"recipe": name, "parameters": count_parameters(recipe, N_CLASSES), **to_dict(recipe)}
            for name, recipe in RECIPES.items()]


def class_weight_table(counts: np.ndarray, recipe: Recipe) -> pd.DataFrame:
    """Return the E-loss weights of a training fold: samples n, effective number Q_n, weight used, weight of eq. 6.

    counts : (n_classes,) distinct training samples
    """
    raw = replace(recipe, class_weights="raw")
    return pd.DataFrame({
        "class": CLASS_NAMES, "n": counts, "Q_n": effective_numbers(counts, recipe.alpha).round(2),
        "weight": effective_number_weights(counts, recipe.alpha, recipe.class_weights).round(4),
        "1/Q_n": effective_number_weights(counts, raw.alpha, "raw").round(5)})
