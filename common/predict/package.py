"""Packages: models that were handed on, as a folder or a zip file. Nothing in them is trusted, and no code is run.

model.json lists the contents, with the SHA-256 of every other file and a checksum of itself. Archives are never
unpacked: files are read by name, after their sizes have been checked. Weights are safetensors, whose names, shapes and
types must be those of the network that the recipe builds. `common/export` writes packages.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from common.artifacts.arrays import arrays_in
from common.artifacts.stage import digest
from common.artifacts.tables import SAFE_ID
from common.classes import CLASS_NAMES
from common.data.sources import CHANNELS, MAX_SIDE
from common.errors import UserError, first_line, listing
from common.predict.model import SCORES, Choice, Member, Model, Reference, decision_of, with_digest
from common.recipes import Recipe, from_dict
from common.score.submission import impossible_part

if TYPE_CHECKING:  # torch takes seconds to load, and a model can be described without it
    import torch

    from common.train.dataset import Normalisation
    from common.train.hardware import Hardware
    from common.train.networks import Classifier

FORMAT, VERSION = "protein-localisation-package", 1
MODEL_FILE = "model.json"
MAX_JSON = 2**23  # bytes of model.json, and of the header of a file of weights: a hundred times the usual
MAX_FILES, MAX_MEMBERS = 10_000, 1000
MAX_INFLATION = 50  # an archive may claim this many times its own size: weights hardly shrink
MAX_LAYERS, MAX_WIDTH = 16, 2**16  # of a head
BLOCK = 2**20
# What damaged files and archives raise.
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)
END_OF_ARCHIVE = struct.Struct("<4s4H2LH")
TYPES = {"F32": 4, "I64": 8}  # of weights, in bytes
NAME = re.compile(r"[\w@+-][\w.@+-]*", re.ASCII)
COPY = "get a new copy of the package, or export it again: python 11_export.py --model WORK --out PACKAGE"
SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
AUTHOR = re.compile(r"\w[\w .,'’-]{0,99}")
# What model.json must have: name -> what is expected in words, function of the value.
PARTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a plain name", lambda value: fits(SAFE_ID, value)),
    "classes": (f"the {len(CLASS_NAMES)} classes of this project", lambda value: value == list(CLASS_NAMES)),
    "channels": (
        f"{', '.join(CHANNELS)}",
        lambda value: isinstance(value, list) and [part_of(row, "name") for row in value] == list(CHANNELS),
    ),
    "pixel_size": ("micrometres above 0", lambda value: is_number(value) and 0 < value < 1000),
    "tta": ("none or dihedral", lambda value: value in ("none", "dihedral")),
    "view": ("whole or crops", lambda value: value in ("whole", "crops")),
    "members": (
        f"a list of 1 to {MAX_MEMBERS} networks",
        lambda value: isinstance(value, list) and 0 < len(value) <= MAX_MEMBERS,
    ),
    "decision": ("thresholds and scores, or null", lambda value: value is None or is_decision(value)),
    "files": ("digests and sizes of files", lambda value: are_files(value)),
    "licence": ("an SPDX identifier, or null", lambda value: value is None or fits(SPDX, value)),
    "authors": ("names", lambda value: isinstance(value, list) and all(fits(AUTHOR, name) for name in value)),
    "training": ("digests and counts", lambda value: is_training(value)),
}
MEMBER_PARTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a plain name", lambda value: fits(NAME, value)),
    "fold": ("a whole number", lambda value: type(value) is int and 0 <= value < 10_000),
    "weight": ("a share from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1),
    "content": ("a digest", lambda value: isinstance(value, str)),
    "recipe": ("the fields of a recipe", lambda value: isinstance(value, dict)),
    "mean": ("four numbers", lambda value: are_four(value)),
    "std": ("four numbers above 0", lambda value: are_four(value) and min(value) > 0),
    "weights": ("a file", lambda value: isinstance(value, str)),
    "reference": ("a file, or null", lambda value: value is None or isinstance(value, str)),
}


class BadPackage(UserError):
    """A package that cannot be used, and why."""

    def __init__(self, path: Path, reason: str, cure: str = COPY) -> None:
        super().__init__(f"{path} {reason}; {cure}")


# --- files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """The files of a package by name, read in place.

    path : of the folder or zip file; prefix : of the names in a zip file of a whole folder, for example 'package/'
    """

    path: Path
    prefix: str = ""

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """Yield a file, which yields no more bytes than its size, and that size. Raises BadPackage."""
        try:
            if self.path.is_dir():
                with open(self.path / name, "rb") as file:
                    yield file, os.fstat(file.fileno()).st_size
                return
            with zipfile.ZipFile(self.path) as archive, archive.open(self.prefix + name) as file:
                yield file, archive.getinfo(self.prefix + name).file_size
        except (FileNotFoundError, IsADirectoryError, KeyError):
            raise BadPackage(self.path, f"has no file {name}") from None
        except UNREADABLE as error:
            raise BadPackage(self.path, f"cannot be read: {name} ({first_line(error)})") from None

    def read(self, name: str, limit: int) -> bytes:
        """Return a file's content; raises BadPackage if it has more than `limit` bytes."""
        with self.open(name) as (file, size):
            if size > limit:
                raise BadPackage(self.path, f"has a {name} of {size:,} bytes; at most {limit:,} are accepted")
            return file.read(limit)

    def sha256(self, name: str) -> str:
        """Return the digest of a file's content."""
        result = hashlib.sha256()
        with self.open(name) as (file, _):
            while block := file.read(BLOCK):
                result.update(block)
        return result.hexdigest()


def is_package(path: Path) -> bool:
    """Tell whether a path may be a package: a folder with a model.json, or a zip file."""
    return (path / MODEL_FILE).is_file() if path.is_dir() else zipfile.is_zipfile(path)


def files_of(path: Path) -> Files:
    """Return the files of a package; raises BadPackage for an archive that claims more than it can hold."""
    if path.is_dir():
        return Files(path)
    check_entries(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except UNREADABLE as error:
        raise BadPackage(path, f"is not a readable zip file ({first_line(error)})") from None
    names = [entry.filename for entry in entries]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise BadPackage(path, f"has {twice[0]!r} more than once")
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise BadPackage(path, f"has {entry.filename!r} encrypted or compressed with a method other than deflate")
    claimed, size = sum(entry.file_size for entry in entries), os.path.getsize(path)
    if claimed > MAX_INFLATION * size:
        raise BadPackage(path, f"claims {claimed:,} bytes in {size:,}")
    found = [name for name in names if name.rpartition("/")[2] == MODEL_FILE and name.count("/") < 2]
    if len(found) != 1:
        raise BadPackage(path, f"has {'several' if found else 'no'} {MODEL_FILE}, so it is not a package")
    return Files(path, found[0].removesuffix(MODEL_FILE))


def check_entries(path: Path) -> None:
    """Refuse an archive with very many entries before its list is read into memory."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - END_OF_ARCHIVE.size - 2**16))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    if place >= 0 and len(tail) - place >= END_OF_ARCHIVE.size:
        n_entries = END_OF_ARCHIVE.unpack_from(tail, place)[4]
        if n_entries > MAX_FILES:
            raise BadPackage(path, f"has {n_entries} entries or more; at most {MAX_FILES} are accepted")


# --- model.json --------------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and -1e300 < value < 1e300  # nor NaN


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def fits(form: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and bool(form.fullmatch(value))


def are_four(values: object) -> bool:
    return isinstance(values, list) and len(values) == 4 and all(map(is_number, values))


def part_of(row: object, key: str) -> Any:
    return row.get(key) if isinstance(row, dict) else None


def is_safe_path(name: object) -> bool:
    """Tell whether a file's name stays in the package: plain names joined by slashes."""
    return isinstance(name, str) and len(name) < 400 and all(NAME.fullmatch(part) for part in name.split("/"))


def are_files(found: object) -> bool:
    return (
        isinstance(found, dict)
        and len(found) <= MAX_FILES
        and all(
            is_safe_path(name)
            and isinstance(part_of(row, "sha256"), str)
            and type(part_of(row, "bytes")) is int
            and row["bytes"] >= 0
            for name, row in found.items()
        )
    )


def are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def is_training(found: object) -> bool:
    """Tell whether a value is what `common/export` writes about the training data; all of it may be missing."""
    if not isinstance(found, dict) or not isinstance(found.get("digest", ""), str):
        return False
    counts = ("samples", "external_samples", "held_out_samples")
    return not found.keys() & set(counts) or all(is_count(found.get(key)) for key in counts)


def is_decision(found: object) -> bool:
    """Tell whether a value can be used as thresholds.json, and its scores be shown."""
    needed = {"recipes", "combine", "weights", "thresholds"}
    if not isinstance(found, dict) or not needed <= found.keys() or found["combine"] not in ("mean", "weighted"):
        return False
    return not impossible_part(found) and (found.keys().isdisjoint(SCORES) or are_scores(found))


def are_scores(found: dict) -> bool:
    """Tell whether all scores of a decision are there, with values that can be shown."""
    shares = [found[key] for key in SCORES if key.startswith("score") and key in found]
    pairs = [found[key] for key in ("interval", "interval_held_out") if key in found]
    rows = found.get("per_class")
    return (
        {"score_cross_fitted", "interval", "n_samples", "per_class"} <= found.keys()
        and ("score_held_out" not in found or {"interval_held_out", "n_held_out"} <= found.keys())
        and all(are_numbers(values) for values in (shares, *pairs))
        and all(len(pair) == 2 for pair in pairs)
        and all(is_count(found[key]) for key in ("n_samples", "n_present", "n_held_out") if key in found)
        and [part_of(row, "class") for row in rows or ()] == list(CLASS_NAMES)
        and all(are_numbers([row.get("f1_cross_fitted"), row.get("threshold")]) for row in rows or ())
    )


def wrong_parts(found: dict, parts: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> list[str]:
    """Return a line for each part that is missing or impossible."""
    return [
        f"{key}: expected {expected}, found {str(found.get(key, 'nothing'))[:80]!r}"
        for key, (expected, fits) in parts.items()
        if key not in found or not fits(found[key])
    ]


def read_description(files: Files) -> dict:
    """Return the content of a package's model.json, checked; raises BadPackage."""
    path, content = files.path, files.read(MODEL_FILE, MAX_JSON)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadPackage(path, f"has a {MODEL_FILE} that is not valid JSON ({first_line(error)})") from None
    if part_of(found, "format") != FORMAT:
        raise BadPackage(path, f"has a {MODEL_FILE} that is not one of this project")
    if found.get("format_version") != VERSION:
        raise BadPackage(
            path,
            f"is of format version {str(found.get('format_version'))[:20]}, this version of the project reads {VERSION}",
            f"use the version that wrote it ({str(found.get('code_version', 'unknown'))[:40]}), or export it again "
            "with this one",
        )
    if found.get("checksum") != checksum(found):
        raise BadPackage(path, f"has a {MODEL_FILE} that was changed after the export")
    wrong = wrong_parts(found, PARTS)
    for row in found["members"] if "members" in found and isinstance(found["members"], list) else ():
        wrong += wrong_parts(row, MEMBER_PARTS) if isinstance(row, dict) else ["members: expected objects"]
    if wrong:
        raise BadPackage(path, f"has a {MODEL_FILE} with impossible parts:\n{listing(wrong)}\n", COPY)
    return found


def checksum(found: dict) -> str:
    """Return the digest of a description without its own checksum."""
    return digest({key: value for key, value in found.items() if key != "checksum"})


def check_files(files: Files, found: dict) -> list[str]:
    """Refuse missing or changed files that predictions need; return warnings about others."""
    needed = {name for row in found["members"] for name in (row["weights"], row["reference"]) if name is not None}
    if unlisted := sorted(needed - found["files"].keys()):
        raise BadPackage(files.path, f"does not list these files of its networks:\n{listing(unlisted)}\n")
    wrong, warnings = [], []
    for name, row in found["files"].items():
        reason = why_other(files, name, row)
        if reason and name in needed:
            wrong.append(f"{name} {reason}")
        elif reason:
            warnings.append(f"{files.path}: {name} {reason}; predictions do not need it")
    if wrong:
        raise BadPackage(files.path, f"is damaged, incomplete or was changed after the export:\n{listing(wrong)}\n")
    return warnings


def why_other(files: Files, name: str, row: dict) -> str | None:
    """Return how a file differs from its record; None if it does not."""
    try:
        with files.open(name) as (_, size):
            if size != row["bytes"]:
                return f"has {size:,} bytes, expected {row['bytes']:,}"
        return None if files.sha256(name) == row["sha256"] else "has another SHA-256"
    except BadPackage as error:
        return "is missing" if "has no file" in str(error) else "cannot be read"


# --- the model ---------------------------------------------------------------------------------------------


def open_package(path: Path, choice: Choice) -> Model:
    """Return the model of a package, or those of its networks that are chosen. Raises UserError."""
    files = files_of(path)
    found = read_description(files)
    warnings = check_files(files, found)
    members = [make_member(files, row, found["files"][row["weights"]]["bytes"]) for row in found["members"]]
    if abs(sum(member.weight for member in members) - 1) > 1e-3:
        raise BadPackage(path, "has networks whose weights do not have the sum 1")
    kept = chosen(path, members, choice)
    decision, whole = found["decision"], len(kept) == len(members)
    if decision and not whole:
        warnings.append(f"the thresholds are those of all {len(members)} networks, of which {len(kept)} are used")
    return with_digest(
        Model(
            name=found["name"],
            source=path,
            members=tuple(kept),
            pixel_size=float(found["pixel_size"]),
            **decision_of(decision, whole),
            tta=found["tta"],
            view=found["view"],
            reference=read_references(files, found),
            warnings=tuple(warnings),
        )
    )


def make_member(files: Files, row: dict, size: int) -> Member:
    """Return a network of a package, which is read when it is needed. Raises BadPackage for an impossible recipe."""
    try:
        recipe = from_dict(row["recipe"])
    except UserError as error:
        raise BadPackage(
            files.path, f"has a network that this version does not know: {row['name']}: {error}", "use a newer version"
        ) from None
    if wrong := wrong_types(recipe):
        raise BadPackage(files.path, f"has a recipe with a {wrong} of the wrong type: {row['name']}")
    if recipe.image_size > MAX_SIDE or len(recipe.buffers) > MAX_LAYERS or max(recipe.buffers, default=0) > MAX_WIDTH:
        raise BadPackage(files.path, f"has a network of impossible size: {row['name']} fold {row['fold']}")
    load = partial(load_weights, files, row["weights"], size, recipe, tuple(row["mean"]), tuple(row["std"]))
    return Member(row["name"], row["fold"], recipe, float(row["weight"]), load, row["content"])


def wrong_types(recipe: Recipe) -> str:
    """Return the first field whose value is of another type than its default; "" if there is none."""
    numbers = {"buffers": int, "dropouts": (int, float), "learning_rates": (int, float), "augmentations": str}
    for name, value in vars(recipe).items():
        default = getattr(Recipe, name)
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            return name
        if name in numbers and not all(isinstance(part, numbers[name]) for part in value):  # type: ignore[arg-type]
            return name
    return ""


def chosen(path: Path, members: list[Member], choice: Choice) -> list[Member]:
    """Return the chosen members, with weights of sum 1; raises UserError for a choice that the package lacks."""
    has = {(member.name, member.fold) for member in members}
    names = list(choice.runs or dict.fromkeys(member.name for member in members))
    folds = {name: [m.fold for m in members if m.name == name] for name in names}
    missing = [name for name in names if not folds[name]]
    missing += [
        f"{name} fold {fold}"
        for name in names
        for fold in choice.folds or ()
        if folds[name] and (name, fold) not in has
    ]
    if missing:
        raise UserError(
            f"{path} does not have {', '.join(missing)}; it has {', '.join(member.label for member in members)}"
        )
    kept = [m for m in members if m.name in names and (choice.folds is None or m.fold in choice.folds)]
    total = sum(member.weight for member in kept)
    return [replace(m, weight=m.weight / total if total else 1 / len(kept)) for m in kept]


def read_references(files: Files, found: dict) -> dict[str, Reference]:
    """Return how the networks see samples like their training data, by the label of the member."""
    result = {}
    for row in found["members"]:
        if row["reference"]:
            width = last_width(files, row["weights"], found["files"][row["weights"]]["bytes"])
            content = files.read(row["reference"], found["files"][row["reference"]]["bytes"])
            result[f"{row['name']} fold {row['fold']}"] = read_reference(files.path, row["reference"], content, width)
    return result


def read_reference(path: Path, name: str, content: bytes, width: int) -> Reference:
    """Return the reference in the content of an .npz file; width : of its embeddings. Raises BadPackage."""
    try:
        arrays = arrays_in(io.BytesIO(content), len(content))
        reference = Reference(*(arrays[key] for key in ("ids", "targets", "embeddings", "means")))
    except (ValueError, KeyError) as error:
        raise BadPackage(path, f"has an impossible {name} ({first_line(error)})") from None
    shapes, n = [array.shape for array in vars(reference).values()], len(reference.ids)
    kinds = [array.dtype.kind for array in vars(reference).values()]
    fine = shapes == [(n,), (n,), (n, width), (n, len(CHANNELS))] and kinds == ["U", "U", "f", "f"]
    if not (fine and all(np.isfinite(array).all() for array in (reference.embeddings, reference.means))):
        raise BadPackage(path, f"has an impossible {name} (arrays of {shapes}, or numbers that are not finite)")
    return reference


def last_width(files: Files, name: str, size: int) -> int:
    """Return the number of inputs of the last layer in a file of weights, from its header; 0 if it has none."""
    with files.open(name) as (file, _):
        shapes = read_header(files.path, name, file, size)[1]
    layers = {key: shape for key, (_, shape) in shapes.items() if re.fullmatch(r"head\.\d{1,3}\.weight", key)}
    last = max(layers, key=lambda key: int(key.split(".")[1]), default="")
    return layers[last][1] if last and len(layers[last]) == 2 else 0


# --- weights -----------------------------------------------------------------------------------------------


def load_weights(
    files: Files,
    name: str,
    size: int,
    recipe: Recipe,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    hardware: "Hardware",
) -> "tuple[Classifier, Normalisation]":
    """Return a package's network on the device, and its normalisation; also choose this process's kernels.

    size : of the file of weights in bytes
    Raises BadPackage unless the file holds exactly the tensors of the recipe's network, all finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from common.classes import N_CLASSES
    from common.train.dataset import Normalisation
    from common.train.hardware import set_kernels
    from common.train.networks import build_model

    set_kernels(hardware)
    with torch.device("meta"):
        expected = build_model(recipe, N_CLASSES).state_dict()
    with files.open(name) as (file, _):
        start, shapes = read_header(files.path, name, file, size)
        check_header(files.path, name, size, start, shapes, expected)
        content = start + file.read(size - len(start))
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise BadPackage(files.path, f"has a damaged {name} ({first_line(error)})") from None
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise BadPackage(files.path, f"has weights that are NaN or infinite in {name}, for example {broken[0]}")
    network = build_model(recipe, N_CLASSES)
    network.load_state_dict(tensors)
    on_device = network.to(hardware.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return on_device, Normalisation(mean, std)


def read_header(path: Path, name: str, file: IO[bytes], size: int) -> tuple[bytes, dict[str, tuple[str, tuple]]]:
    """Return the start of a safetensors file up to its tensors, and the type and shape that it claims for each.

    size : of the file in bytes. Raises BadPackage.
    """
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(size - 8, MAX_JSON):
        raise BadPackage(path, f"has a {name} that is not a safetensors file")
    header = file.read(length)
    try:
        found = {key: row for key, row in json.loads(header).items() if key != "__metadata__"}
        return first + header, {key: (row["dtype"], tuple(row["shape"])) for key, row in found.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise BadPackage(path, f"has a {name} whose header is not valid ({first_line(error)})") from None


def check_header(
    path: Path, name: str, size: int, start: bytes, shapes: dict, expected: "Mapping[str, torch.Tensor]"
) -> None:
    """Refuse a file of weights that does not announce exactly the expected tensors.

    start, shapes : what `read_header` returns
    """
    wanted = {
        key: ("F32" if tensor.is_floating_point() else "I64", tuple(tensor.shape)) for key, tensor in expected.items()
    }
    wrong = [f"{key} is missing" for key in sorted(wanted.keys() - shapes.keys())]
    wrong += [f"{key[:80]!r} is unexpected" for key in sorted(shapes.keys() - wanted.keys())]
    wrong += [
        f"{key} is {str(shapes[key])[:80]}, expected {wanted[key]}"
        for key in wanted
        if shapes.get(key, wanted[key]) != wanted[key]
    ]
    if wrong:
        raise BadPackage(path, f"has a {name} that is not of its recipe's network:\n{listing(wrong)}\n")
    needed = len(start) + sum(math.prod(shape) * TYPES[kind] for kind, shape in wanted.values())
    if size != needed:
        raise BadPackage(path, f"has a {name} of {size:,} bytes; its tensors need {needed:,}")
