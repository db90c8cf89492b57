"""Packages from strangers: what is refused, by name and before memory is spent; and that good ones give the same model."""

import argparse
import io
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.artifacts.stage import fingerprint
from common.classes import CLASS_NAMES
from common.errors import UserError
from common.export import package as export
from common.export.card import write_card
from common.predict import package
from common.predict.describe import describe_model
from common.predict.model import Choice, Member, Model, Reference, open_model, with_digest
from common.predict.package import MODEL_FILE, checksum
from common.recipes import get_recipe
from common.train.dataset import Normalisation
from common.train.hardware import Hardware
from common.train.networks import build_model

CPU = Hardware(torch.device("cpu"))
RECIPE = get_recipe("demo_gapnet", ["buffers=8", "dropouts=0"])
WEIGHTS = "weights/tiny-fold0.safetensors"


def network(seed, hardware):
    torch.manual_seed(seed)
    return build_model(RECIPE, 28).eval(), Normalisation((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))


def tiny_model():
    rng = np.random.default_rng(0)
    members = tuple(Member("tiny", k, RECIPE, 0.5, partial(network, k), f"content {k}") for k in (0, 1))
    names = np.array(["a", "b"])
    reference = Reference(
        names, np.array(["0", "2 22"]), rng.random((2, 8), np.float32), rng.random((2, 4), np.float32)
    )
    return with_digest(
        Model(
            "tiny",
            Path("nowhere"),
            members,
            thresholds=rng.random(28),
            calibration=rng.random((28, 3)),
            scores={
                "score_cross_fitted": 0.5,
                "interval": [0.4, 0.6],
                "n_samples": 9,
                "per_class": [
                    {"class": name, "positives": 9 * k, "f1_cross_fitted": k / 28, "threshold": 0.5}
                    for k, name in enumerate(CLASS_NAMES)
                ],
            },
            reference={"tiny fold 0": reference},
        )
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A package without optional parts."""
    folder = tmp_path_factory.mktemp("good") / "package"
    training = {"digest": "0" * 64, "samples": 9, "external_samples": 0, "held_out_samples": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "training_of", lambda model: training)
        export.write_files(tiny_model(), folder, export.Options("tiny"))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "package")


def open_all(path):
    """Open a package and load all its networks."""
    model = open_model(path)
    return model, [member.load(CPU) for member in model.members]


def describe(folder, change):
    """Change model.json as somebody would who also knows about the checksum."""
    found = json.loads((folder / MODEL_FILE).read_text())
    change(found)
    (folder / MODEL_FILE).write_text(json.dumps(found | {"checksum": checksum(found)}))


def record(folder, name):
    """Make model.json fit a file that was changed."""
    row = {"sha256": fingerprint(folder / name), "bytes": (folder / name).stat().st_size}
    describe(folder, lambda found: found["files"].update({name: row}))


def zipped(folder, path, prefix="", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


# --- good packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "stored", "deflated", "whole folder"])
def test_a_package_is_the_same_model(folder, tmp_path, form):
    path = folder
    if form != "folder":
        method = zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED
        path = zipped(folder, tmp_path / "p.zip", "package/" if form == "whole folder" else "", method)
    expected, (found, networks) = tiny_model(), open_all(path)
    assert found.digest == expected.digest and not found.warnings and found.name == "tiny"
    np.testing.assert_array_equal(found.thresholds, expected.thresholds)
    np.testing.assert_array_equal(found.calibration, expected.calibration)
    assert found.scores == expected.scores and found.tta == "dihedral" and found.fallback == "argmax"
    for name, array in vars(expected.reference["tiny fold 0"]).items():
        np.testing.assert_array_equal(getattr(found.reference["tiny fold 0"], name), array)
    for seed, (network_found, normalise) in enumerate(networks):
        own, own_normalise = network(seed, CPU)
        assert normalise == own_normalise
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, network_found.state_dict()[name])


def test_networks_can_be_chosen(folder):
    model = open_model(folder, Choice(folds=[1]))
    assert [(member.fold, member.weight) for member in model.members] == [(1, 1.0)]
    assert model.scores is None and "the thresholds are those of all 2 networks" in model.warnings[0]
    with pytest.raises(UserError, match=r"does not have tiny fold 7; it has tiny fold 0, tiny fold 1"):
        open_model(folder, Choice(folds=[0, 7]))
    with pytest.raises(UserError, match="does not have other"):
        open_model(folder, Choice(runs=["other"]))


def test_a_changed_card_is_only_a_warning(folder):
    (folder / "README.md").write_text("mine")
    assert "README.md has 4 bytes" in open_model(folder).warnings[0]
    (folder / "README.md").unlink()
    assert "README.md is missing; predictions do not need it" in open_model(folder).warnings[0]


def test_a_description_is_read_without_torch(folder):
    import subprocess
    import sys

    from tests.conftest import ROOT

    code = "import sys; from pathlib import Path; from common.predict.model import open_model\n"
    code += "open_model(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT).returncode == 0


# --- model.json ----------------------------------------------------------------------------------------------


def change_first(**values):
    return lambda found: found["members"][0].update(values)


def change_recipe(**values):
    return lambda found: found["members"][0]["recipe"].update(values)


CHANGES = {
    "another format": (lambda found: found.update(format="x"), "is not one of this project"),
    "a newer format": (lambda found: found.update(format_version=2), "format version 2, .* reads 1; use the version"),
    "other classes": (lambda found: found["classes"].reverse(), "classes: expected the 28 classes"),
    "other channels": (lambda found: found["channels"].reverse(), "channels: expected red, green, blue, yellow"),
    "no members": (lambda found: found.update(members=[]), "members: expected a list of 1 to 1000"),
    "members of another kind": (lambda found: found.update(members=[7]), "members: expected objects"),
    "a NaN threshold": (lambda found: found["decision"]["thresholds"].__setitem__(3, math.nan), "decision: expected"),
    "a score that is text": (lambda found: found["decision"].update(score_held_out="x"), "decision: expected"),
    "scores in part": (lambda found: found["decision"].pop("n_samples"), "decision: expected"),
    "a class's score that is text": (
        lambda found: found["decision"]["per_class"][5].update(f1_cross_fitted="x"),
        "decision: expected",
    ),
    "a held-out score alone": (lambda found: found["decision"].update(score_held_out=0.5), "decision: expected"),
    "counts that are text": (lambda found: found["training"].update(samples="x"), "training: expected"),
    "a licence with markup": (lambda found: found.update(licence="<b>"), "licence: expected"),
    "an author of another kind": (lambda found: found.update(authors=[3]), "authors: expected"),
    "a size that is no whole number": (change_recipe(image_size=768.0), "image_size of the wrong type"),
    "a width that is none": (change_recipe(buffers=[8.0, 8], dropouts=[0, 0]), "buffers of the wrong type"),
    "ranks": (lambda found: found["decision"].update(combine="rank"), "decision: expected"),
    "a path": (lambda found: found["files"].update({"../x": {"sha256": "", "bytes": 0}}), "files: expected digests"),
    "an absolute path": (lambda found: found["files"].update({"/etc/passwd": {"sha256": "", "bytes": 0}}), "files: "),
    "an unlisted file": (change_first(weights="weights/x"), "does not list these files .*\n.*weights/x"),
    "an unsafe name": (change_first(name="../x"), "name: expected a plain name"),
    "a deviation of 0": (change_first(std=[1, 1, 1, 0]), "std: expected four numbers above 0"),
    "an infinite mean": (change_first(mean=[math.inf, 1, 1, 1]), "mean: expected four numbers"),
    "weights of sum 1.5": (change_first(weight=1.0), "do not have the sum 1"),
    "an unknown encoder": (change_recipe(encoder="mine"), "does not know: tiny: recipe field encoder is 'mine'"),
    "an unknown field": (change_recipe(later=3), "fields that this one does not have: later=3"),
    "a field of another type": (change_recipe(batch_size="x"), "wrong type"),
    "a huge image": (change_recipe(image_size=10**9), "impossible size"),
    "a huge head": (change_recipe(buffers=[10**9], dropouts=[0]), "impossible size"),
    "a deep head": (change_recipe(buffers=[8] * 99, dropouts=[0] * 99), "impossible size"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_impossible_description_is_refused(folder, what):
    change, message = CHANGES[what]
    describe(folder, change)
    with pytest.raises(UserError, match=message):
        open_model(folder)


ODD = (
    None,
    True,
    -1,
    0,
    3,
    1.5,
    1e308,
    10**40,
    10**400,
    math.nan,
    math.inf,
    "",
    "x",
    "../x",
    "\0",
    [],
    [[]],
    {},
    [1, "a"],
    {"a": 1},
)


def places(value, path=()):
    """Yield the path of every value in a JSON document; of long lists the first and the last."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for key in sorted({0, len(value) - 1} if value else {}):
            yield from places(value[key], (*path, key))


def test_any_odd_value_anywhere_is_refused_or_does_no_harm(good, tmp_path):
    """Put odd values everywhere in model.json: each ends in one message, or in a model that can be described."""
    content, rng = (good / MODEL_FILE).read_text(), np.random.default_rng(0)
    shutil.copytree(good, tmp_path / "p")
    refused, everywhere = 0, list(places(json.loads(content)))[1:]
    for path in everywhere:
        found = json.loads(content)
        row = found
        for key in path[:-1]:
            row = row[key]
        row[path[-1]] = ODD[rng.integers(len(ODD))]
        (tmp_path / "p" / MODEL_FILE).write_text(json.dumps(found | {"checksum": checksum(found)}))
        try:
            model = open_model(tmp_path / "p")
            assert describe_model(model) and write_card(json.loads(content) | {"decision": found["decision"]})
            assert all(0 < member.side <= 8192 for member in model.members)
        except UserError:
            refused += 1
    assert len(everywhere) > 150 and refused > len(everywhere) / 3


def test_all_wrong_parts_are_listed_at_once(folder):
    describe(folder, lambda found: (found.update(tta="x", pixel_size=-1), change_first(fold=-1)(found)))
    with pytest.raises(UserError, match=r"pixel_size: (.|\n)*tta: (.|\n)*fold: ") as error:
        open_model(folder)
    assert "export it again: python 11_export.py" in str(error.value)


def test_a_description_changed_by_hand_is_told_by_its_checksum(folder):
    path = folder / MODEL_FILE
    path.write_text(path.read_text().replace('"fallback": "argmax"', '"fallback": "empty"'))
    with pytest.raises(UserError, match=r"model.json that was changed after the export; get a new copy"):
        open_model(folder)


@pytest.mark.parametrize("content", [b"{", b"[" * 10**6, b"[]", b"\xff\xfe", b"1" * 5000, b"{}", b'{"format": []}'])
def test_a_description_that_is_none_is_refused(folder, content):
    (folder / MODEL_FILE).write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON|not one of this project"):
        open_model(folder)


def test_a_huge_description_is_not_read(folder):
    with open(folder / MODEL_FILE, "ab") as file:
        file.truncate(2**40)  # a sparse file: reading it would need a terabyte
    with pytest.raises(UserError, match="model.json of 1,099,511,627,776 bytes; at most 8,388,608 are accepted"):
        open_model(folder)


# --- files ---------------------------------------------------------------------------------------------------


def test_changed_and_missing_files_are_listed_by_name(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    (folder / "weights/tiny-fold1.safetensors").unlink()
    (folder / "reference/tiny-fold0.npz").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged, incomplete or was changed after the export") as error:
        open_model(folder)
    told = str(error.value)
    assert "tiny-fold0.safetensors has another SHA-256" in told and "tiny-fold1.safetensors is missing" in told
    assert "tiny-fold0.npz has 0 bytes, expected" in told


TENSORS = {
    "a missing tensor": (lambda tensors: tensors.pop("head.0.weight"), "head.0.weight is missing"),
    "another tensor": (lambda tensors: tensors.update(more=torch.zeros(3)), "'more' is unexpected"),
    "another shape": (lambda t: t.update({"head.0.bias": torch.zeros(9)}), r"head.0.bias is .*9.*expected .*\(8,\)"),
    "another type": (lambda t: t.update({"head.0.bias": torch.zeros(8).half()}), "head.0.bias is .*F16.*expected"),
    "a NaN": (lambda t: t["head.0.bias"].fill_(math.nan), "NaN or infinite in .*, for example head.0.bias"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_weights_of_another_network_are_refused(folder, what):
    change, message = TENSORS[what]
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    record(folder, WEIGHTS)
    with pytest.raises(UserError, match=message):
        open_all(folder)


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_under_another_name_is_never_run(folder, tmp_path):
    Bomb.marker = tmp_path / "ran"
    for content in (pickle.dumps(Bomb()), pickled_by_torch()):
        (folder / WEIGHTS).write_bytes(content)
        record(folder, WEIGHTS)
        with pytest.raises(UserError, match="is not a safetensors file|header is not valid"):
            open_all(folder)
    assert not (tmp_path / "ran").exists()


def pickled_by_torch():
    buffer = io.BytesIO()
    torch.save({"head.0.weight": Bomb()}, buffer)
    return buffer.getvalue()


def header_of(value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


HEADERS = {
    "a huge length": struct.pack("<Q", 2**62) + b"{}",
    "no JSON": header_of(b"{" * 10),
    "a list": header_of([1]),
    "no shape": header_of({"a": {"dtype": "F32"}}),
    "deep": header_of(b"[" * 10**6),
    "huge tensors": header_of({"a": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}),
    "nothing": b"",
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_claim_anything_are_refused(folder, what):
    (folder / WEIGHTS).write_bytes(HEADERS[what])
    record(folder, WEIGHTS)
    with pytest.raises(UserError, match="not a safetensors file|header is not valid|impossible reference"):
        open_all(folder)


def test_offsets_that_overlap_are_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    found = json.loads(content[8 : 8 + length])
    found["head.0.bias"]["data_offsets"] = [0, 32]
    text = json.dumps(found, separators=(",", ":")).encode().ljust(length)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    record(folder, WEIGHTS)
    with pytest.raises(UserError, match="has a damaged weights/tiny-fold0|bytes; its tensors need"):
        open_all(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.array([object()])},
        {"embeddings": np.zeros((2, 5), np.float32)},
        {"embeddings": np.array(["a", "b"])},
        {"means": np.full((2, 4), np.nan, np.float32)},
        {"targets": np.array(["0"])},
    ],
    ids=["objects", "width", "text", "NaN", "length"],
)
def test_an_impossible_reference_is_refused(folder, change):
    name = "reference/tiny-fold0.npz"
    with np.load(folder / name) as arrays:
        found = dict(arrays)
    np.savez(folder / name, **found | change)
    record(folder, name)
    with pytest.raises(UserError, match="has an impossible reference/tiny-fold0.npz"):
        open_model(folder)


# --- archives ------------------------------------------------------------------------------------------------


def test_an_archive_that_inflates_is_refused_before_it_is_read(folder, tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / MODEL_FILE, MODEL_FILE)
        archive.writestr("weights/x", bytes(2**26))
    with pytest.raises(UserError, match=r"claims 67,\d+,\d+ bytes in"):
        open_model(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions_are_refused(folder, tmp_path, method):
    with pytest.raises(UserError, match="compressed with a method other than deflate"):
        open_model(zipped(folder, tmp_path / "p.zip", method=method))


def test_archives_that_are_no_package_are_refused(folder, tmp_path):
    path = tmp_path / "p.zip"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="has no model.json, so it is not a package"):
        open_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in (MODEL_FILE, "other/" + MODEL_FILE):
            archive.write(folder / MODEL_FILE, name)
    with pytest.raises(UserError, match="has several model.json"):
        open_model(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.write(folder / MODEL_FILE, MODEL_FILE)
    with pytest.raises(UserError, match="has 'model.json' more than once"):
        open_model(path)
    path.write_bytes(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 60000, 60000, 0, 0, 0))
    with pytest.raises(UserError, match="has 60000 entries or more; at most 10000 are accepted"):
        open_model(path)
    path.write_text("nothing")
    with pytest.raises(UserError, match="neither a work folder with trained runs nor a package"):
        open_model(path)


def test_names_that_lead_out_of_an_archive_are_never_written(folder, tmp_path):
    path = zipped(folder, tmp_path / "p.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped", "x")
    before = sorted(tmp_path.parent.iterdir())
    open_all(path)
    assert sorted(tmp_path.parent.iterdir()) == before and not (tmp_path / "escaped").exists()


def test_damaged_archives_are_refused_or_read_whole(folder, tmp_path):
    """Flip bytes and cut ends: each ends in one message, or changes nothing that predictions need."""
    content = zipped(folder, tmp_path / "p.zip", method=zipfile.ZIP_DEFLATED).read_bytes()
    rng, path, expected = np.random.default_rng(0), tmp_path / "damaged.zip", tiny_model().digest
    refused = 0
    for case in range(60):
        damaged = bytearray(content if case % 3 else content[: rng.integers(len(content))])
        ends = len(damaged) - 1500 if case % 2 else 0  # half of them in the list of files
        for place in rng.integers(max(0, ends), max(1, len(damaged)), 3):
            damaged[place : place + 1] = bytes([rng.integers(256)]) * bool(damaged)
        path.write_bytes(damaged)
        try:
            assert open_model(path).digest == expected
        except UserError:
            refused += 1
    assert refused > 30


# --- writing -------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_measured(good):
    card = (good / "README.md").read_text()
    for words in (
        "# tiny",
        "**0.500** (95 % bootstrap interval 0.400 to 0.600) on 9 samples",
        "Not tested at all (no positives): Nucleoplasm.",
        "Hardly tested (fewer than 10 positives): Nuclear membrane.",
        "Good at (F1 of 0.8 or more): Mitochondria, Aggresome, Cytosol",
        "No licence is stated",
        "1. red: microtubules",
        "9 labelled samples",
    ):
        assert words in card, words
    assert max(map(len, card.split("\n\n"))) < 2000


def test_no_path_of_this_machine_is_in_a_package(good):
    for file in good.rglob("*"):
        assert not file.is_file() or str(Path.home()).encode() not in file.read_bytes() or str(Path.home()) == "/"
        assert not file.is_file() or str(good.parent).encode() not in file.read_bytes()


def flags(**values):
    default = {"name": None, "licence": None, "author": [], "onnx": None, "bioimage": None, "reference": True}
    return argparse.Namespace(**default | values)


def test_optional_parts_are_left_out_with_the_command_that_adds_them(monkeypatch):
    monkeypatch.setattr(export, "serves", lambda wish: False)
    options, (line,) = export.choose_options(tiny_model(), flags())
    assert not options.onnx and not options.bioimage and options.name == "tiny" and options.reference
    told = "packages that are optional are missing; to add them: pip install"
    assert line.startswith(f"without ONNX and BioImage.IO: {told}")
    assert all(name in line for name in ("onnx>", "onnxruntime>", "bioimageio.core>", "'pydantic<2.14'"))
    for part in ("onnx", "bioimage"):
        with pytest.raises(UserError, match=f"--{part}: {told}"):
            export.choose_options(tiny_model(), flags(**{part: True}))
    assert export.choose_options(tiny_model(), flags(onnx=False, bioimage=False))[1] == []


def test_parts_are_on_where_they_can_be_made(monkeypatch):
    monkeypatch.setattr(export, "serves", lambda wish: True)
    parts = lambda **values: vars(export.choose_options(tiny_model(), flags(**values))[0])
    assert parts()["onnx"] and parts()["bioimage"] and parts(author=["A. Müller"])["authors"] == ("A. Müller",)
    assert parts(bioimage=False)["onnx"] and not parts(onnx=False)["bioimage"]
    with pytest.raises(UserError, match="--bioimage describes the ONNX graph: leave --no-onnx out"):
        parts(onnx=False, bioimage=True)


def test_what_an_onnx_graph_cannot_hold_is_said(monkeypatch):
    monkeypatch.setattr(export, "serves", lambda wish: True)
    assert "for five crops" in export.why_no_onnx(replace(tiny_model(), view="crops"))
    monkeypatch.setattr(export, "n_bytes", lambda member: 10**9)
    assert "2 networks exceed the 2 GB of one graph" in export.why_no_onnx(tiny_model())
    monkeypatch.setattr(export, "n_bytes", lambda member: 1)
    first, second = tiny_model().members
    other = replace(second, recipe=get_recipe("demo_gapnet", ["image_size=512", "crop_size=512"]))
    several = replace(tiny_model(), members=(first, other))
    options, (line,) = export.choose_options(several, flags())
    assert options.onnx and not options.bioimage and "without BioImage.IO: it describes one graph" in line


@pytest.mark.parametrize(
    "wrong",
    [{"licence": text} for text in ("CC BY 4.0", "-", "MIT\n", "x" * 70)]
    + [{"name": "../x"}, {"author": ["A", "<b>"]}],
    ids=str,
)
def test_texts_that_cannot_be_in_a_package_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}: expected"):
        export.choose_options(tiny_model(), flags(**wrong))


def test_every_file_of_a_package_has_its_digest(good):
    found = json.loads((good / MODEL_FILE).read_text())
    names = {path.relative_to(good).as_posix() for path in good.rglob("*") if path.is_file()}
    assert found["files"].keys() == names - {MODEL_FILE}
    assert all(fingerprint(good / name) == row["sha256"] for name, row in found["files"].items())
    assert (
        package.is_package(good)
        and oct((good / WEIGHTS).stat().st_mode)[-3:] == oct((good / "README.md").stat().st_mode)[-3:]
    )


@pytest.mark.skipif(not all(find_spec(name) for name in ("onnx", "onnxruntime")), reason="onnx is not installed")
@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("Input height (96) doesn't match model (224).\nMore"), UserError),
        (UserError("already clear"), UserError),
        (OSError("disk full"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_networks_that_cannot_become_a_graph_are_told_with_the_flag(error, expected):
    from common.export.onnx import explained

    with pytest.raises(expected) as found, explained():
        raise error
    if isinstance(error, RuntimeError):
        assert "(96) doesn't match model (224)" in str(found.value) and "--no-onnx" in str(found.value)
    else:
        assert found.value is error
