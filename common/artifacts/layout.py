"""Where each file of a work folder is, and the command that makes it."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pandas as pd

from common.artifacts.stage import digest, read_sidecar, sidecar
from common.artifacts.tables import read_table
from common.errors import DATA, UserError, command
from common.recipes import store_settings


@dataclass(frozen=True)
class Layout:
    """The paths of a work folder, and the commands for messages about them.

    data : the input folder, which commands name if it is not the default
    """

    work: Path
    data: Path = DATA

    # --- stages 01 to 03

    @property
    def samples(self) -> Path:
        return self.work / "samples.csv"

    @property
    def left_out(self) -> Path:
        """The samples that stage 01 left out, and why."""
        return self.work / "left_out.csv"

    @property
    def images(self) -> Path:
        return self.work / "images"

    @property
    def journal(self) -> Path:
        """Stage 01's record of each sample's source files and stored images."""
        return self.images / "journal.jsonl"

    def store(self, name: str) -> Path:
        """Return the folder of the images of one size (see `recipes.stored_size`)."""
        return self.images / name

    def store_table(self, name: str) -> Path:
        """Return the table with the statistics of a store's images."""
        return self.images / f"{name}.csv"

    @property
    def duplicates(self) -> Path:
        return self.work / "duplicates.csv"

    @property
    def duplicate_pairs(self) -> Path:
        return self.work / "duplicate_pairs.csv"

    @property
    def folds(self) -> Path:
        return self.work / "folds.csv"

    # --- stages 04 and 05

    @property
    def experiments(self) -> Path:
        """Runs with names of their own: what they are based on, and what is changed."""
        return self.work / "experiments.json"

    @property
    def runs(self) -> Path:
        return self.work / "runs"

    def run(self, name: str, fold: int) -> Path:
        """Return the folder of one training run."""
        return self.runs / name / f"fold{fold}"

    def network(self, name: str, fold: int, checkpoint: str = "best") -> Path:
        """Return a training's checkpoint: best, last or final."""
        return self.run(name, fold) / f"{checkpoint}.pt"

    def predictions(self, name: str, part: str, fold: int | None = None) -> Path:
        """Return the file of a part's (oof, test, held_out) probabilities: one fold's, or all folds'."""
        return self.work / "predictions" / name / (f"{part}.npz" if fold is None else f"fold{fold}_{part}.npz")

    def reference(self, name: str, fold: int) -> Path:
        """Return the file of how a network sees samples like its training data (see `predict.reference`)."""
        return self.work / "reference" / name / f"fold{fold}.npz"

    def predicted_runs(self) -> list[str]:
        """Return the names of the runs that have out-of-fold predictions."""
        return sorted(path.parent.name for path in (self.work / "predictions").glob("*/oof.npz"))

    # --- stages 06 to 09

    @property
    def thresholds(self) -> Path:
        return self.work / "thresholds.json"

    @property
    def comparison(self) -> Path:
        """What `06_thresholds.py --compare` found."""
        return self.work / "comparison.json"

    @property
    def submission(self) -> Path:
        return self.work / "submission.csv"

    @property
    def submissions(self) -> Path:
        """The list of submissions written elsewhere."""
        return self.work / "submissions.json"

    @property
    def tables(self) -> Path:
        return self.work / "tables"

    @property
    def report(self) -> Path:
        return self.work / "report.html"

    # --- commands

    def command(self, script: str, *flags: object) -> str:
        """Return the command of a script on these folders."""
        return command(script, *self.flags(), *flags)

    def flags(self) -> list[str]:
        """Return the flags of a script that name these folders."""
        return [*(["--data", str(self.data)] if self.data != DATA else []), "--work", str(self.work)]

    def preprocess_command(self, store: str | None = None) -> str:
        """Return the last command of stage 01, plus the size of `store` if that command does not fill it."""
        record = read_sidecar(self.samples) if sidecar(self.samples).is_file() else {"outputs": {}}
        arguments = record.get("arguments", [])
        if store is not None and f"images/{store}.csv" not in record["outputs"]:
            fields = ("size_rule", "size_divisor", "image_size", "crop_size")
            kept = [argument for argument in arguments if argument.partition("=")[0] not in fields]
            arguments = [
                argument
                for argument, after in pairwise([*kept, "--"])
                if argument != "--set" or not after.startswith("--")
            ]
            arguments += ["--set", *store_settings(store)]
        return command("01_preprocess.py", *arguments, "--work", self.work)

    # --- tables; a missing one is an error that names the command that makes it

    def read_samples(self) -> pd.DataFrame:
        return read_table(self.samples, self.command("01_preprocess.py"))

    def read_duplicates(self) -> pd.DataFrame:
        return read_table(self.duplicates, self.command("02_dedup.py"))

    def read_pairs(self) -> pd.DataFrame:
        return read_table(self.duplicate_pairs, self.command("02_dedup.py"))

    def read_folds(self) -> pd.DataFrame:
        return read_table(self.folds, self.command("03_make_folds.py"))

    def read_store(self, name: str, ids: Collection[str]) -> pd.DataFrame:
        """Return stage 01's statistics of the given Ids' stored images of one size, in their order."""
        rerun = self.preprocess_command(name)
        table = read_table(self.store_table(name), rerun).set_index("Id")
        missing = [Id for Id in ids if Id not in table.index]
        if missing:
            raise UserError(
                f"{self.store(name)}: {len(missing)} missing samples, for example {missing[0]}; run: {rerun}"
            )
        return table.loc[list(ids)].reset_index()

    def images_digest(self, store: str, ids: Collection[str]) -> str:
        """Return a fingerprint of the given Ids' stored images, from the columns that every version writes."""
        columns = r"^(Id|side|crc|(mean|std|zeros|saturated)_\w+)$"
        return digest(self.read_store(store, ids).filter(regex=columns))
