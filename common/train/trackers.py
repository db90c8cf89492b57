"""Trackers: other programs that show trainings. Each gets the rows of the log as named values, one point per epoch.

To add one, write a function that opens it, and add a row to TRACKERS and its name to `command_line.TRACKERS`.
"""

import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from threading import Thread
from typing import Any

from filelock import FileLock

from common.artifacts.files import read_lines, write_text
from common.artifacts.layout import Layout
from common.artifacts.stage import read_sidecar, sidecar
from common.classes import CLASS_NAMES
from common.errors import UserError, first_line

SECONDS_TO_CLOSE = 60
NAMES = {
    "train_loss": "loss/train",
    "valid_loss": "loss/valid",
    "macro_f1": "macro F1/valid at 0.5",
    "macro_f1_thresholds": "macro F1/valid with thresholds",
    "learning_rate": "learning rate/last group",
    "images_per_second": "speed/images per second",
    "memory_mib": "memory/MiB",
    "seconds": "seconds/train",
    "valid_seconds": "seconds/valid",
}


@dataclass(frozen=True)
class Tracked:
    """A training as trackers know it.

    folder : of the training, in the folder `work`; label : its name and fold; settings : recipe, fold and seed
    """

    work: Path
    folder: Path
    label: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """A tracker's record of one training.

    log : function of (values by name, epoch from 1); close : called once at the end
    """

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


@dataclass(frozen=True)
class Tracker:
    """A row of TRACKERS.

    package : to install; module : that it has
    open : begin the record of a training; what an earlier, stopped run recorded of it is replaced
    mark : file or folder in the training's folder that shows that there is a record
    """

    package: str
    module: str
    open: Callable[[Tracked], Opened]
    mark: str


def values_of(row: dict) -> dict[str, float]:
    """Return what trackers show of a row of the log, by name."""
    per_class = zip(CLASS_NAMES, row.get("class_f1", []), strict=False)
    return {
        **{name: row[key] for key, name in NAMES.items() if key in row},
        **{f"F1 of a class at 0.5/{name}": score for name, score in per_class},
    }


# --- the table ---------------------------------------------------------------------------------------------


def open_tensorboard(tracked: Tracked) -> Opened:
    """Write events into the folder tensorboard of the training: tensorboard --logdir WORK/runs."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(tracked.folder / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(tracked.folder / "tensorboard")

    def log(values: dict[str, float], epoch: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return Opened(log, writer.close)


def open_mlflow(tracked: Tracked) -> Opened:
    """Write a run to MLFLOW_TRACKING_URI, else to WORK/mlflow.db, which mlflow ui shows."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # of its own it tries for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    import mlflow
    from mlflow.entities import Metric, Param

    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{tracked.work.resolve() / 'mlflow.db'}"
    name, mark = tracked.work.resolve().name, tracked.folder / "mlflow.txt"
    with FileLock(tracked.work / ".mlflow.db.lock"):  # folds that train at once must not create it twice
        client = mlflow.MlflowClient(store)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
    if mark.is_file():
        client.delete_run(mark.read_text().strip())
        mark.unlink()
    run = client.create_run(experiment, run_name=tracked.label)
    write_text(mark, run.info.run_id)
    client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in tracked.settings.items()])

    def log(values: dict[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(key.replace("&", "and"), value, now, epoch) for key, value in values.items()]
        client.log_batch(run.info.run_id, metrics=metrics)

    return Opened(log, lambda: client.set_terminated(run.info.run_id))


def open_wandb(tracked: Tracked) -> Opened:
    """Write a run to the folder wandb of the training, offline unless WANDB_MODE says otherwise: wandb sync FOLDER."""
    os.environ.setdefault("WANDB_MODE", "offline")
    import wandb

    folder = tracked.folder / "wandb"
    mark = folder / "id.txt"
    number = mark.read_text().strip() if mark.is_file() else secrets.token_hex(4)
    shutil.rmtree(folder, ignore_errors=True)
    write_text(mark, number)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or tracked.work.resolve().name,
        id=number,
        resume="allow",
        name=tracked.label,
        dir=tracked.folder,
        config=tracked.settings,
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )
    return Opened(lambda values, epoch: run.log(values, step=epoch), run.finish)


TRACKERS = {
    "tensorboard": Tracker("tensorboard", "tensorboard", open_tensorboard, "tensorboard"),
    "mlflow": Tracker("mlflow", "mlflow", open_mlflow, "mlflow.txt"),
    "wandb": Tracker("wandb", "wandb", open_wandb, "wandb"),
}


# --- tracking a training -----------------------------------------------------------------------------------


def check_trackers(names: list[str]) -> tuple[str, ...]:
    """Return the trackers, each once; refuse those whose packages are not installed now, instead of after hours."""
    missing = [TRACKERS[name].package for name in names if find_spec(TRACKERS[name].module) is None]
    if missing:
        raise UserError(f"--track needs packages that are not installed; run: pip install {' '.join(missing)}")
    return tuple(dict.fromkeys(names))


@contextmanager
def tracking(names: Sequence[str], tracked: Tracked, history: list[dict]) -> Iterator[Callable[[dict], None]]:
    """Yield a function that gives a row of the log to all of these trackers, after all rows of `history`.

    A tracker that fails, for example without network, is left out from then on, with one warning. It never ends a
    training.
    """
    opened: dict[str, Opened] = {}

    def attempt(name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # whatever other programs raise
            opened.pop(name, None)
            reason = shorten(first_line(error), 200)
            print(
                f"warning: {tracked.label}: {name} no longer records this training ({reason}); training continues",
                file=sys.stderr,
                flush=True,
            )

    def write(row: dict) -> None:
        values = values_of(row)
        for name, tracker in list(opened.items()):
            attempt(name, partial(tracker.log, values, row["epoch"]))

    for name in names:
        if tracker := attempt(name, partial(TRACKERS[name].open, tracked)):
            opened[name] = tracker
    try:
        for row in history:
            write(row)
        yield write
    finally:
        for name, tracker in list(opened.items()):
            attempt(name, partial(within, SECONDS_TO_CLOSE, tracker.close))


def within(seconds: float, act: Callable[[], object]) -> None:
    """Call `act()`, and raise TimeoutError if it takes longer: without network, an upload can wait for days."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            act()
        except Exception as error:  # passed on below
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"its end took more than {seconds:g} s")
    if errors:
        raise errors[0]


def track_finished(names: Sequence[str], layout: Layout, folds: Iterable[tuple[str, int]]) -> None:
    """Give folds that were trained without these trackers to them, from their logs; folds : of (run, fold)."""
    for run, fold in folds:
        folder = layout.run(run, fold)
        log, record = folder / "log.jsonl", folder / "best.pt"
        missing = [name for name in names if not (folder / TRACKERS[name].mark).exists()]
        if missing and log.is_file():
            settings = read_sidecar(record)["parameters"] if sidecar(record).is_file() else {}
            with tracking(missing, Tracked(layout.work, folder, f"{run} fold {fold}", settings), read_lines(log)):
                pass
