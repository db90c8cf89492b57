"""A description for BioImage.IO, the zoo of models for microscopy, checked by its own validator."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from loguru import logger

from common.artifacts.files import writing
from common.errors import UserError, listing
from common.export.onnx import LARGEST_CHECKED, OPSET, TOLERANCE, open_session, test_images

if TYPE_CHECKING:
    from bioimageio.spec import ValidationSummary

FORMAT_VERSION = "0.5.3"  # oldest of the specification that has all that is used here; the validator upgrades it
SMALLEST, STEP = 96, 32  # pixels
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_+() -]")
ARTICLE = (
    "Zhang et al., Multi-labelled proteins recognition for high-throughput microscopy images using deep convolutional "
    "neural networks, BMC Bioinformatics 22 (Suppl 3), 2021"
)


def write_bioimage(folder: Path, description: dict) -> None:
    """Write test_input.npy, test_output.npy and bioimageio.yaml into a package with one graph.

    Raises UserError if the validator of BioImage.IO refuses the description, or finds other test outputs.
    """
    graph = description["onnx"][0]
    side = max(SMALLEST, min(graph["side"], LARGEST_CHECKED) // STEP * STEP)
    images = test_images((1, 4, side, side)).numpy()
    write_array(folder / "test_input.npy", images)
    write_array(folder / "test_output.npy", open_session(folder / graph["file"]).run(None, {"images": images})[0])
    with quiet():
        write_yaml(folder, content(description, graph["file"]))
        check(folder / "bioimageio.yaml")


def check_licence(licence: str | None) -> None:
    """Refuse a licence that the specification does not know, before any work is done."""
    from bioimageio.spec.model.v0_5 import LicenseId

    try:
        LicenseId(licence or "MIT")
    except ValueError:
        raise UserError(
            f"--licence: {licence} is not in BioImage.IO's list of SPDX identifiers, for example CC-BY-4.0, CC0-1.0 or "
            "MIT (upper and lower case count); leave its description out with --no-bioimage"
        ) from None


def write_array(path: Path, array: np.ndarray) -> None:
    with writing(path) as temporary:
        np.save(temporary, array)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bioimageio's own log."""
    logger.disable("bioimageio")
    try:
        yield
    finally:
        logger.enable("bioimageio")


def content(description: dict, graph: str) -> dict:
    """Return the description as plain types, in the words of the specification."""
    name = NOT_IN_NAMES.sub("-", f"Protein localisation in cells ({description['name']})")[:128]
    channel = {"type": "channel", "channel_names": [row["name"] for row in description["channels"]]}
    space = [{"type": "space", "id": axis, "size": {"min": SMALLEST, "step": STEP}} for axis in "yx"]
    found = {
        "type": "model",
        "format_version": FORMAT_VERSION,
        "name": name,
        "description": "Which of 28 cell structures a protein is in: several labels per image of 4 channels "
        "(microtubules, protein, nucleus, endoplasmic reticulum).",
        "timestamp": datetime.now(UTC).replace(microsecond=0).isoformat(),
        "authors": [{"name": name} for name in description["authors"]] or [{"name": "not stated"}],
        "cite": [{"text": ARTICLE, "doi": "10.1186/s12859-021-04196-2"}],
        "documentation": "README.md",
        "tags": ["fluorescence-light-microscopy", "classification", "cells", "2d", "protein-localisation"],
        "inputs": [
            {
                "id": "images",
                "description": "values from 0 to 255",
                "axes": [{"type": "batch"}, channel, *space],
                "test_tensor": {"source": "test_input.npy"},
                "data": {"type": "float32", "range": [0, 255]},
            }
        ],
        "outputs": [
            {
                "id": "probabilities",
                "description": "of each class, not exclusive",
                "axes": [{"type": "batch"}, {"type": "channel", "channel_names": description["classes"]}],
                "test_tensor": {"source": "test_output.npy"},
                "data": {"type": "float32", "range": [0, 1]},
            }
        ],
        "weights": {"onnx": {"source": graph, "opset_version": OPSET}},
        "config": {"bioimageio": {"reproducibility_tolerance": [{"absolute_tolerance": TOLERANCE}]}},
    }
    return found | ({"license": description["licence"]} if description["licence"] else {})


def write_yaml(folder: Path, found: dict) -> None:
    """Write bioimageio.yaml; raises UserError with what is not valid."""
    from bioimageio.spec import InvalidDescr, ValidationContext, build_description, save_bioimageio_yaml_only

    described = build_description(found, context=ValidationContext(root=folder, file_name="bioimageio.yaml"))
    refuse_errors(described.validation_summary)
    assert not isinstance(described, InvalidDescr)
    with writing(folder / "bioimageio.yaml") as temporary, open(temporary, "w", encoding="utf-8") as file:
        save_bioimageio_yaml_only(described, file)


def check(path: Path) -> None:
    """Let the validator load the description and run the graph on the test input; raises UserError if it fails."""
    from bioimageio.core import test_model

    refuse_errors(test_model(path))


def refuse_errors(summary: "ValidationSummary") -> None:
    """Raise UserError with the errors of a validation."""
    if summary.status not in ("passed", "valid-format"):
        errors = [f"{'.'.join(map(str, error.loc))}: {error.msg}" for error in summary.errors]
        raise UserError(
            f"the validator of BioImage.IO refuses the package:\n{listing(errors)}\nleave the description out with "
            "--no-bioimage"
        )
