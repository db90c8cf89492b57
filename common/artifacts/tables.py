"""The CSV tables that stages pass on: their columns, and the check that Ids are plain file names."""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from common.artifacts.files import writing
from common.artifacts.text_tables import BadTable, read_text_table
from common.errors import UserError, listing

STATISTICS = " ".join(
    f"{value}_{channel}~"
    for value in ("mean", "std", "zeros", "saturated")
    for channel in ("red", "green", "blue", "yellow")
)
# The columns of each table: text, whole numbers (#), or numbers that may be unknown (~).
COLUMNS = {
    "samples.csv": "Id part Target side#",
    "images": f"Id side# crc {STATISTICS}",
    "left_out.csv": "Id part Target place#",
    "duplicates.csv": "Id part Target near_group group kept#",
    "folds.csv": "Id Target part group fold# copies#",
    "duplicate_pairs.csv": "Id part Target other_Id other_part other_Target red# green# blue# agreement~",
    "lr_find.csv": "learning_rate~ loss~ smoothed~",
    "hard_classes.csv": "class ranked# kept#",
    "hard_samples.csv": "Id Target share_kept~ mean_loss~",
    "gains.csv": "model column gain~ low~ high~ paper~",
    "submission.csv": "Id Predicted",
}
KINDS = {"#": int, "~": float}


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    with writing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def read_table(path: Path, made_by: str) -> pd.DataFrame:
    """Read a CSV artifact, text as text; if it is missing or damaged, raise a UserError with the command to run."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; run: {made_by}")
    columns = COLUMNS.get("images" if path.parent.name == "images" else path.name, "").split()
    kinds = {name.rstrip("#~"): KINDS.get(name[-1]) for name in columns}

    def kinds_of(header: list[str]) -> dict[str, type]:
        missing = [name for name in kinds if name not in header]
        if missing:
            raise BadTable(f"has no column {missing[0]}, which its stage writes")
        return {name: kind for name, kind in kinds.items() if kind}

    try:
        table = read_text_table(path, kinds_of)
    except BadTable as error:
        raise UserError(f"{path} {error}; delete it and run: {made_by}") from None
    for name in table.columns.intersection(["Id", "other_Id"]):
        check_ids(table[name], path)
    return table


SAFE_ID = re.compile(r"\w[\w .+()-]*(?<![ .])")
# Device names on Windows, which may see a shared folder.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def check_ids(ids: Iterable[str], path: Path) -> None:
    """Refuse Ids that are not plain file names: an Id becomes part of a path and must not leave its folder."""
    unsafe = [Id for Id in ids if not SAFE_ID.fullmatch(Id) or RESERVED.fullmatch(Id) or len(Id.encode()) > 200]
    if unsafe:
        raise UserError(f"{path} has Ids that are not plain file names:\n{listing(map(repr, unsafe))}")
