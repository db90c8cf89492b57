"""The curve of the learning rate finder, as a table and a picture."""

from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.files import writing
from common.artifacts.tables import write_csv
from common.train.schedules import centred, steepest_learning_rate, suggest_learning_rate


def save_lr_curve(folder: Path, rates: list[float], losses: list[float]) -> tuple[float, float]:
    """Write lr_find.csv and lr_find.png; returns the learning rates at which the loss is lowest and falls fastest."""
    from matplotlib.figure import Figure

    lowest, steepest, curve = (
        suggest_learning_rate(rates, losses),
        steepest_learning_rate(rates, losses),
        centred(losses),
    )
    write_csv(
        folder / "lr_find.csv", pd.DataFrame({"learning_rate": rates, "loss": losses, "smoothed": pd.Series(curve)})
    )
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="0.75", label="loss of the batch")
    axes.plot(rates[: len(curve)], curve, color="C0", label="smoothed")
    axes.axvline(lowest, color="C1", linestyle="--", label=f"lowest {lowest:.2g}")
    axes.axvline(steepest, color="C2", linestyle=":", label=f"steepest {steepest:.2g}")
    axes.set(
        xscale="log",
        xlabel="learning rate of the head (per batch, growing)",
        ylabel="E-loss",
        ylim=(0, 1.1 * max(losses[0], np.median(losses))),
    )
    axes.legend()
    with writing(folder / "lr_find.png") as temporary:
        figure.savefig(temporary, dpi=120)
    return lowest, steepest
