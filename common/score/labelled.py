"""What thresholds are found on: members' probabilities of labelled samples, ours or from anywhere."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.layout import Layout
from common.data.labels import parse_targets, read_labels
from common.score.ensemble import combine, keep_common, stack_members
from common.score.members import (
    check_origin,
    check_there,
    held_out_files,
    labelled_rows,
    member_files,
    read_groups,
    read_members,
)
from common.score.thresholds import score_held_out


@dataclass(frozen=True)
class Samples:
    """Labelled samples with the members' probabilities.

    stack : (n_members, n, 28); targets : (n, 28) bool; groups : (n,), each of which is never split
    """

    stack: np.ndarray
    targets: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Labelled:
    """Members, and the labels of the samples that they predicted.

    names, files : of the members; labels : the file of `table`, which has Id, Target and, if ours, group
    made_by : the command that makes the members' files
    ours : whether the files are stage 05's, with the labels of stage 03
    held_out : files of stage 05 for samples that nothing was fitted to
    """

    names: list[str]
    files: list[Path]
    labels: Path
    table: pd.DataFrame
    made_by: str
    ours: bool
    held_out: dict[str, Path] = field(default_factory=dict)

    def inputs(self) -> dict[str, Path]:
        """Return the files by the names that the sidecar of the thresholds has for them."""
        members = dict(zip(self.names, self.files, strict=True))
        return {"folds.csv" if self.ours else "labels": self.labels, **members, **self.held_out}

    def read(self, ids: Path | None, groups: Path | None, common_ids: bool) -> Samples:
        """Read the members' probabilities of the labelled samples.

        ids, groups : CSV files with the Ids of .npy files, and with groups; by default ours, or each sample by itself
        common_ids : leave out samples that not all files have
        """
        members = read_members(self.files, ids, self.made_by if self.ours else None)
        wanted = members[0][0] if self.ours else self.table["Id"].to_numpy()
        if common_ids:
            members, wanted = keep_common(members, wanted)
        cure = "" if self.ours else " (--common-ids leaves them out)"
        stack = stack_members(members, self.names, wanted, cure=cure)
        rows = labelled_rows(self.table, wanted, self.made_by)
        own = rows["group"].to_numpy() if "group" in rows else wanted
        return Samples(stack, parse_targets(rows["Target"]), read_groups(groups, wanted) if groups else own)

    def held_out_score(self, found: dict, how: str) -> dict:
        """Return what thresholds are worth on the samples held out; {} unless all members predicted them.

        found : weights and thresholds; how : the members are combined
        """
        if not self.held_out or len(self.held_out) < len(self.files):
            return {}
        members = read_members(list(self.held_out.values()), None, self.made_by)
        rows = labelled_rows(self.table, members[0][0], self.made_by)
        probs = combine(stack_members(members, self.names), how, found["weights"])
        return score_held_out(parse_targets(rows["Target"]), probs, rows["group"].to_numpy(), found["thresholds"])


def find_labelled(layout: Layout, recipes: list[str], given: list[Path] | None, labels: Path | None) -> Labelled:
    """Return the recipes' out-of-fold predictions, or the files `given` with their labels (default: train.csv).

    Raises UserError for files that are missing or not what they should be.
    """
    made_by = layout.command("05_predict_oof.py", "--recipes", ",".join(recipes))
    names, files = member_files(given, layout.work, recipes, "oof")
    check_there(files, None if given else made_by)
    if given:
        labels = labels or layout.data / "train.csv"
        return Labelled(names, files, labels, read_labels(labels), made_by, ours=False)
    check_origin(layout.work, recipes, "oof")
    folds = layout.read_folds()
    held_out = held_out_files(layout.work, recipes, folds, made_by)
    return Labelled(names, files, layout.folds, folds, made_by, ours=True, held_out=held_out)
