"""TensorBoard's view of a training: the rows of its log as scalars, one point an epoch."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.artifacts.files import read_lines
from common.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NAMES = {
    "train_loss": "loss/train",
    "valid_loss": "loss/valid",
    "macro_f1": "macro F1/valid at 0.5",
    "learning_rate": "learning rate/last group",
    "seconds": "seconds/train",
    "valid_seconds": "seconds/valid",
}


def summary_writer() -> "type[SummaryWriter]":
    """Return torch's SummaryWriter; raises UserError where the package that it needs is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package that is not installed; run: pip install tensorboard") from None
    return SummaryWriter


@contextmanager
def scalars(folder: Path, history: list[dict]) -> Iterator[Callable[[dict], None]]:
    """Yield a function that writes a row of the log to `folder`/tensorboard, after all rows of `history`.

    Events of an earlier run that was stopped are written again from its history, so that no step is there twice.
    """
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with summary_writer()(folder / "tensorboard") as writer:

        def write(row: dict) -> None:
            for key, name in NAMES.items():
                if key in row:
                    writer.add_scalar(name, row[key], row["epoch"])
            writer.flush()

        for row in history:
            write(row)
        yield write


def write_finished(folder: Path) -> None:
    """Write the events of a fold that was trained without them, from its log."""
    log = folder / "log.jsonl"
    if log.is_file() and not (folder / "tensorboard").is_dir():
        with scalars(folder, read_lines(log)):
            pass
