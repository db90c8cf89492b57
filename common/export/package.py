"""Write a package: a folder or a zip file that `common/predict/package.py` and other programs read."""

import argparse
import os
import re
import shlex
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from common.artifacts.files import write_json, write_text, writing
from common.artifacts.layout import Layout
from common.artifacts.stage import Stage, digest, fingerprint, read_sidecar
from common.artifacts.tables import SAFE_ID
from common.artifacts.versions import made_with
from common.classes import CLASS_NAMES
from common.data.folds import HOLD_OUT
from common.data.labels import parse_targets
from common.errors import UserError
from common.export.card import write_card
from common.predict.model import SIDE, Member, Model
from common.predict.package import (
    AUTHOR,
    FORMAT,
    MODEL_FILE,
    SPDX,
    VERSION,
    checksum,
    files_of,
    is_package,
    read_description,
)
from common.predict.reference import with_reference
from common.process.progress import progress
from common.process.requirements import requirement, serves
from common.recipes import BY_SOURCE, to_dict
from common.train.hardware import Hardware, HardwareOptions, choose_hardware

MEANINGS = {
    "red": "microtubules",
    "green": "the protein whose place is asked for",
    "blue": "nucleus",
    "yellow": "endoplasmic reticulum",
}
ONNX_PACKAGES = ("onnx>=1.16", "onnxruntime>=1.18")
BIOIMAGE_PACKAGES = (*ONNX_PACKAGES, "bioimageio.core>=0.9", "pydantic<2.14")  # its validator fails with 2.14
MAX_GRAPH = 1.9e9  # bytes: ONNX files are protocol buffers, of at most 2 GB
A_ZIP_FILE = (1980, 1, 1, 0, 0, 0)  # the time of all its files: the same model gives the same bytes


@dataclass(frozen=True)
class Options:
    """What goes into a package besides the weights.

    licence : SPDX identifier of the weights' licence, or None if none is stated
    authors : names of those who trained the model
    reference : whether it keeps how its networks see training images, with their Ids and labels
    """

    name: str
    licence: str | None = None
    onnx: bool = False
    bioimage: bool = False
    reference: bool = True
    authors: tuple[str, ...] = ()


def choose_options(model: Model, args: argparse.Namespace) -> tuple[Options, list[str]]:
    """Return what 11's flags ask for, and a line for each part that is left out.

    args : with name, licence, author, reference; onnx and bioimage, where None means: if its packages are installed
    Raises UserError for a part that was asked for and cannot be made, and for an impossible name, licence or author.
    """
    check_texts(args.name, args.licence, args.author)
    reasons = {"onnx": why_no_onnx(model), "bioimage": why_no_bioimage(model)}
    asked = {"onnx": args.onnx, "bioimage": args.bioimage}
    for part, reason in reasons.items():
        if asked[part] and reason:
            raise UserError(f"--{part}: {reason}")
    if args.bioimage and args.onnx is False:
        raise UserError("--bioimage describes the ONNX graph: leave --no-onnx out")
    lacking: dict[str, list[str]] = {}
    for part, reason in reasons.items():
        if reason and asked[part] is None:
            lacking.setdefault(reason, []).append({"onnx": "ONNX", "bioimage": "BioImage.IO"}[part])
    lines = [f"without {' and '.join(parts)}: {reason}" for reason, parts in lacking.items()]
    onnx = not reasons["onnx"] and (args.onnx is not False)
    bioimage = onnx and not reasons["bioimage"] and (args.bioimage is not False)
    own = read_description(files_of(model.source)) if is_package(model.source) else {}
    name = args.name or own.get("name") or re.sub(r"[^\w.+-]", "-", "+".join(model.names))[:100]
    licence, authors = args.licence or own.get("licence"), args.author or own.get("authors", [])
    return Options(name, licence, onnx, bioimage, args.reference, tuple(authors)), lines


def check_texts(name: str | None, licence: str | None, authors: list[str]) -> None:
    """Refuse texts that cannot be in a package."""
    if name is not None and not SAFE_ID.fullmatch(name):
        raise UserError(f"--name: expected letters, digits and plain signs, found {name!r}")
    if licence is not None and not SPDX.fullmatch(licence):
        raise UserError(f"--licence: expected an SPDX identifier, for example CC-BY-4.0 or MIT, found {licence!r}")
    if wrong := [author for author in authors if not AUTHOR.fullmatch(author)]:
        raise UserError(f"--author: expected a person's name, found {wrong[0]!r}; give the flag once a person")


def why_no_onnx(model: Model) -> str | None:
    """Return why a model has no ONNX graphs; None if it can have them."""
    if missing_packages(ONNX_PACKAGES):
        return install(missing_packages(BIOIMAGE_PACKAGES))  # all optional parts with one command
    if model.view != "whole":
        return "its thresholds are for five crops of an image, a graph takes whole ones"
    if sum(map(n_bytes, model.members)) > MAX_GRAPH:
        return f"its {len(model.members)} networks exceed the 2 GB of one graph; choose some with --folds"
    return None


def why_no_bioimage(model: Model) -> str | None:
    """Return why a model has no BioImage.IO description; None if it can have one."""
    if missing := missing_packages(BIOIMAGE_PACKAGES):
        return install(missing)
    if reason := why_no_onnx(model):
        return reason
    if len(stores := {member.recipe.store for member in model.members}) > 1:
        return f"it describes one graph, these networks take images of {len(stores)} sizes; choose a run with --recipes"
    return None


def missing_packages(names: tuple[str, ...]) -> list[str]:
    """Return those of some requirements that this Python does not satisfy."""
    return [name for name in names if not serves(requirement(name))]


def install(names: list[str]) -> str:
    return f"packages that are optional are missing; to add them: {shlex.join(['pip', 'install', *names])}"


def n_bytes(member: Member) -> int:
    """Return the size of a network's parameters in bytes."""
    from common.train.networks import count_parameters

    return 4 * count_parameters(member.recipe, len(CLASS_NAMES))


# --- the stage ---------------------------------------------------------------------------------------------


def export_stage(model: Model, out: Path, options: Options) -> Stage:
    """Return the stage that makes a package."""
    inputs = {"model": model.digest, "scores": digest(model.scores), "training": digest(training_of(model))}
    parts = asdict(options) | {"format_version": VERSION}
    return Stage("11_export", main_file(out), parts, inputs, whole=out, folder_flag="--out")


def main_file(out: Path) -> Path:
    """Return the file that carries the sidecar: the zip file itself, or model.json in the folder."""
    return out if is_zip(out) else out / MODEL_FILE


def is_zip(out: Path) -> bool:
    return out.suffix.lower() == ".zip"


def refuse_other(model: Model, out: Path, stage: Stage) -> None:
    """Raise UserError if `out` is anything but a package of this name that an earlier export wrote."""
    if out.resolve() == model.source.resolve():
        raise UserError(f"--out {out} is the model itself; give another --out")
    if not out.exists() or (out.is_dir() and not is_zip(out) and not any(out.iterdir())):
        return
    found = read_sidecar(stage.artifact) if stage.sidecar.is_file() else {"parameters": {}}
    if found.get("stage") != stage.name or out.is_dir() == is_zip(out):
        raise UserError(f"{out} exists and is no package that this stage wrote; delete it, or give another --out")
    if found.get("source") != source_of(model) or found["parameters"].get("name") != stage.parameters["name"]:
        raise UserError(
            f"{out} is the package of another model, {found['parameters'].get('name')}; delete it, or give another --out"
        )


def source_of(model: Model) -> str:
    """Return a digest that tells models of different places apart, without saying where they are."""
    return digest(str(model.source.resolve()))


def make(model: Model, out: Path, options: Options, stage: Stage) -> list[str]:
    """Make the package beside its place, then put it there whole. Return lines that describe it."""
    building, scratch = out.with_name(f".{out.name}.making"), out.with_name(f".{out.name}.reference")
    with stage.lock():
        shutil.rmtree(building, ignore_errors=True)
        try:
            if options.reference:
                model, note = with_reference(model, scratch, HardwareOptions())
                if note:
                    print(f"11_export: without a record of the training data, for images unlike it: {note}", flush=True)
            description = write_files(model, building, options)
            earlier = read_sidecar(stage.artifact)["outputs"] if stage.sidecar.is_file() else {}
            with stage.making() as record:
                record.rows, record.notes = len(model.members), {"source": source_of(model)}
                record.also = zip_up(building, out) if is_zip(out) else move(building, out, list(earlier))
        finally:
            for folder in (building, scratch):
                shutil.rmtree(folder, ignore_errors=True)
    return describe(out, description)


def move(building: Path, out: Path, earlier: list[str]) -> list[Path]:
    """Move a package's files to their folder, and delete those of an earlier package that it does not have."""
    names = sorted(path.relative_to(building).as_posix() for path in building.rglob("*") if path.is_file())
    for name in set(earlier) - set(names):
        (out / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == MODEL_FILE):  # model.json last: without it, it is no package
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(building / name, out / name)
    return [out / name for name in names if name != MODEL_FILE]


def zip_up(building: Path, out: Path) -> list[Path]:
    """Write a package's files into one zip file, uncompressed: weights hardly shrink, and can be read in place."""
    paths = sorted((path for path in building.rglob("*") if path.is_file()), key=lambda path: path.name != MODEL_FILE)
    with writing(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for path in progress(paths, len(paths), "zip file", "files"):
            info = zipfile.ZipInfo(path.relative_to(building).as_posix(), A_ZIP_FILE)
            info.external_attr = 0o644 << 16
            info.file_size = path.stat().st_size  # tells zipfile when it needs its 64-bit form
            with open(path, "rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, 2**20)
    return []


def describe(out: Path, description: dict) -> list[str]:
    """Return lines that say what a package holds."""
    size = sum(row["bytes"] for row in description["files"].values())
    decision, graphs = description["decision"], [graph["file"] for graph in description["onnx"]]
    score = "no thresholds: a class is predicted from 0.5"
    if decision and "interval" in decision:
        low, high = decision["interval"]
        score = f"cross-fitted macro F1 {decision['score_cross_fitted']:.3f} [{low:.3f}, {high:.3f}]"
    return [
        f"{out}: {len(description['members'])} networks, {size / 1e6:.1f} MB; {score}",
        f"ONNX: {', '.join(graphs) or 'none'}; BioImage.IO: {'bioimageio.yaml' if description['bioimage'] else 'none'}",
        f"licence of the weights: {description['licence'] or 'none stated (--licence gives one)'}",
    ]


# --- its files ---------------------------------------------------------------------------------------------


def write_files(model: Model, folder: Path, options: Options) -> dict:
    """Write all files of a package into an empty folder; return the content of its model.json."""
    if options.bioimage:
        from common.export.bioimage import check_licence, write_bioimage  # an optional package

        check_licence(options.licence)
    hardware = choose_hardware(HardwareOptions(device="cpu"), training=False)
    members = progress(model.members, len(model.members), "weights", "networks")
    records = [write_member(model, member, folder, options, hardware) for member in members]
    description = describe_model(model, options, records)
    description["onnx"], description["bioimage"] = [], options.bioimage
    if options.onnx:
        from common.export.onnx import write_graphs  # an optional package

        print("11_export: writing the ONNX graph, and comparing it with torch", flush=True)
        description["onnx"] = write_graphs(model, folder, hardware, description)
    write_text(folder / "README.md", write_card(description))
    if options.bioimage:
        print("11_export: BioImage.IO's validator runs the graph", flush=True)
        write_bioimage(folder, description)
    description["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": fingerprint(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    description["checksum"] = checksum(description)
    write_json(folder / MODEL_FILE, description)
    return description


def write_member(model: Model, member: Member, folder: Path, options: Options, hardware: Hardware) -> dict:
    """Write a network's weights and its reference; return its record."""
    network, normalise = member.load(hardware)
    file = f"weights/{member.name}-fold{member.fold}.safetensors"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{member.label} has weights that are NaN or infinite, for example {broken[0]}; train it again")
    with writing(folder / file) as temporary:
        temporary.write_bytes(save(tensors, {"format": "pt"}))
    return {
        "name": member.name,
        "fold": member.fold,
        "weight": member.weight,
        "content": member.content,
        "recipe": to_dict(member.recipe),
        "mean": list(normalise.mean),
        "std": list(normalise.std),
        "weights": file,
        "reference": write_reference(model, member, folder, options),
    }


def write_reference(model: Model, member: Member, folder: Path, options: Options) -> str | None:
    """Write how a network sees samples like its training data, if that is known; return the file's name."""
    reference = model.reference.get(member.label) if options.reference else None
    if reference is None:
        return None
    file = f"reference/{member.name}-fold{member.fold}.npz"
    with writing(folder / file) as temporary:
        np.savez(temporary, **vars(reference))
    return file


def describe_model(model: Model, options: Options, members: list[dict]) -> dict:
    """Return the content of model.json without its files."""
    versions = made_with()
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "name": options.name,
        "licence": options.licence,
        "authors": list(options.authors),
        "classes": list(model.classes),
        "channels": [{"name": name, "meaning": MEANINGS[name]} for name in model.channels],
        "pixel_size": model.pixel_size,
        "pixel_size_at_side": SIDE,
        "images": [images_of(member) for member in one_per_store(model)],
        "tta": model.tta,
        "view": model.view,
        "combine": "mean over the views and over the folds of a run, then the weighted mean over the runs",
        "members": members,
        "decision": decision_of(model),
        "training": training_of(model),
        "model_digest": model.digest,
        "code_version": versions["project"],
        "made_with": {name: versions[name] for name in ("python", "torch", "numpy")},
    }


def one_per_store(model: Model) -> list[Member]:
    """Return the first member of each size of images."""
    return list({member.recipe.store: member for member in reversed(model.members)}.values())[::-1]


def images_of(member: Member) -> dict:
    """Return how a field must be given to a network."""
    recipe = member.recipe
    rule = "768 px for fields up to 2048 px, 1024 px for larger ones" if recipe.size_rule == BY_SOURCE else "fixed"
    return {
        "store": recipe.store,
        "side": member.side,
        "rule": rule,
        "values": "0 to 255, 8 bit, area-averaged from the source",
        "standardised": recipe.standardised,
    }


def decision_of(model: Model) -> dict | None:
    """Return how the model decides, in the words of thresholds.json; None if it has no thresholds."""
    if model.thresholds is None:
        return None
    weights = [sum(member.weight for member in model.members if member.name == name) for name in model.names]
    result = {
        "recipes": model.names,
        "combine": "weighted",
        "weights": weights,
        "thresholds": model.thresholds.tolist(),
        "fallback": model.fallback,
        **(model.scores or {}),
    }
    return result if model.calibration is None else {**result, "calibration": model.calibration.tolist()}


def training_of(model: Model) -> dict:
    """Return what the networks were trained on, as far as that is known: digests, and counts of samples."""
    if is_package(model.source):
        found = read_description(files_of(model.source)).get("training")
        return found if isinstance(found, dict) else {}
    layout = Layout(model.source)
    inputs = {
        member.label: read_sidecar(layout.network(member.name, member.fold))["inputs"] for member in model.members
    }
    digests = {"digest": digest(inputs), "inputs": inputs}
    if not layout.folds.is_file() or any(row.get("folds.csv") != fingerprint(layout.folds) for row in inputs.values()):
        return digests
    table = layout.read_folds()
    used = table[table["fold"] != HOLD_OUT]
    return digests | {
        "samples": len(used),
        "external_samples": int((used["part"] == "external").sum()),
        "held_out_samples": len(table) - len(used),
        "positives": dict(zip(CLASS_NAMES, parse_targets(used["Target"]).sum(axis=0).tolist(), strict=True)),
    }
