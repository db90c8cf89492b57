"""Where a training starts: from a file of pretrained weights with the normalisation that belongs to it, or at random."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.artifacts.stage import fingerprint
from common.errors import UserError
from common.recipes import Recipe
from common.train.networks import build_encoder
from common.train.predict import Normalisation
from common.train.pretrained import PUBLISHED, read_file, read_weights


@dataclass(frozen=True)
class Start:
    """The weights that a training starts from; without a file, random ones."""

    file: Path | None = None
    normalisation: Normalisation | None = None  # that of the weights; None = that of the data
    reason: str = "as asked for"  # why random

    def read(self) -> dict[str, torch.Tensor] | None:
        """Return the encoder's parameters, None for random ones."""
        return read_weights(self.file) if self.file else None

    def inputs(self) -> dict:
        """Return what a sidecar says of the file."""
        return {"weights": fingerprint(self.file)} if self.file else {}

    def describe(self) -> str:
        """Say in a few words what training starts from and how images are normalised, for logs and records."""
        weights = f"from {self.file.name}" if self.file else f"from random weights ({self.reason})"
        return f"{weights}, images normalised as {'for those' if self.normalisation else 'the data asks for'}"


def start_from(recipe: Recipe, pretrained: str, file: Path | None) -> Start:
    """Return the start of a recipe: `file` is what `weights.find_weights` found for `pretrained`.

    Raises UserError where the file is another network's: now, before anything is trained or thrown away.
    """
    if file:
        build_encoder(recipe, read_weights(file))
        of_weights = recipe.normalisation == "weights" and not recipe.standardised
        return Start(file, weights_normalisation(recipe, file) if of_weights else None)
    if pretrained == "none":
        return Start()
    return Start(
        reason="the published ones could not be had"
        if recipe.encoder in PUBLISHED
        else f"none are published for {recipe.encoder}"
    )


def is_four_numbers(values: object) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == 4
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def weights_normalisation(recipe: Recipe, file: Path) -> Normalisation | None:
    """Return the normalisation that weights were trained with: a checkpoint's own, or the published one.

    Yellow is normalised as the channel that its stem weights come from. None where nothing is known.
    """
    saved = read_file(file)
    if "mean" in saved and "std" in saved:
        if not all(map(is_four_numbers, (saved["mean"], saved["std"]))) or min(saved["std"]) <= 0:
            raise UserError(
                f"{file} has a mean or std that is not four numbers, one a channel, those of std above 0; take both "
                "out of the file, or give --pretrained another"
            )
        return Normalisation(tuple(saved["mean"]), tuple(saved["std"]))
    if recipe.encoder not in PUBLISHED:
        return None
    published = PUBLISHED[recipe.encoder]
    return Normalisation(
        *(
            (*values, sum(values) / 3 if recipe.fourth_channel == "mean" else values[0])
            for values in (published.mean, published.std)
        )
    )
