"""Random files from strangers: each one is read or refused with our own error, quickly and in little memory.

HPA_FUZZ_CASES  number of cases in all (default 300; 10000 by hand)
"""

import contextlib
import csv
import faulthandler
import gzip
import io
import json
import os
import re
import shutil
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.artifacts.files import write_json, write_text
from common.artifacts.predictions import load_predictions, save_predictions
from common.artifacts.stage import Record, Stage, sidecar
from common.artifacts.tables import check_ids, read_table
from common.artifacts.text_tables import BadTable, read_text_table
from common.data.images import checksum, read_planes, write_planes
from common.data.journal import read_journal
from common.data.labels import parse_targets, read_csv, read_labels
from common.data.sources import CHANNELS, BadImage, read_channel, read_pixels, table_kind
from common.data.stacks import opened_stack
from common.errors import UserError
from common.score.members import read_groups, read_predictions
from common.score.submission import read_submission
from tests import clothes
from tests.tiffs import agreed, stretched, turned, write_tiff

KINDS = 16  # of tests below, each with its share of the cases
CASES = int(os.environ.get("HPA_FUZZ_CASES", 300)) // KINDS
MAX_SECONDS = 20  # per case, on a busy machine
MAX_GROWTH = 2**20  # kilobytes
PRINTABLE = st.text(st.characters(codec="utf-8"), max_size=30)

fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def no_hang():
    """End a test that hangs in foreign code, and show where it hangs."""
    faulthandler.dump_traceback_later(MAX_SECONDS * CASES, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def memory(kind: str) -> int:
    """Return this process's memory now (VmRSS) or at its peak (VmHWM), in kilobytes."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def outcome(read, *arguments):
    """Return the result of reading, None if it is refused; any other exception fails the test."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started, before = time.monotonic(), memory("VmRSS")
    try:
        return read(*arguments)
    except (UserError, BadImage) as error:
        assert str(error)
        return None
    finally:
        assert time.monotonic() - started < MAX_SECONDS
        assert memory("VmHWM") - before < MAX_GROWTH


# --- damage ------------------------------------------------------------------------------------------------


@st.composite
def damage(draw, content: bytes):
    """Change some bytes, mostly in the header; cut the end off; repeat a part; or all of these."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, min(len(content), 400) - 1) | st.integers(0, len(content) - 1))
        values = draw(
            st.binary(min_size=1, max_size=4) | st.sampled_from([bytes(4), b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
        )
        content[place : place + len(values)] = values
    if draw(st.booleans()):
        for _ in range(draw(st.integers(0, 5))):
            content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    if draw(st.integers(0, 3)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    if draw(st.integers(0, 9)) == 0 and content:
        place = draw(st.integers(0, len(content) - 1))
        content[place:place] = content[: draw(st.integers(0, 1000))]
    return bytes(content)


# --- tables and Ids ----------------------------------------------------------------------------------------

ID = PRINTABLE | st.sampled_from(
    [
        "..",
        "a/../b",
        "/etc/passwd",
        "a\0b",
        "CON",
        "nul.txt",
        "a.",
        "a ",
        "x" * 300,
        "é" * 150,
        "-rf",
        ".x",
        "a\\b",
        "~",
        "$(x)",
        "a\nb",
    ]
)
ROWS = st.lists(st.lists(ID | st.sampled_from(["0", "27", "0 25", "28", ""]), max_size=4), max_size=6)


def as_csv(rows) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([["Id", "Target"], *rows])
    return text.getvalue()


@given(st.binary(max_size=300) | PRINTABLE.map(str.encode) | ROWS.map(as_csv).map(str.encode))
@fuzz
def test_tables_are_read_or_refused(tmp_path, content):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    labels = outcome(read_labels, path)
    if labels is not None:
        assert parse_targets(labels["Target"]).any(axis=1).all()
    outcome(read_csv, path, "Predicted")
    outcome(read_table, path, "python 01_preprocess.py")


# --- dialects of CSV files

FIELD = st.sampled_from(["a", "001", "1e5", "NA", "0 25", "16", "Zürich_1", "x,y", "x;y", 'say "x"', "a b", ""])


@st.composite
def dialect(draw) -> tuple[list[list[str]], bytes]:
    """Return rows of Id, Target and a note, and a file of them in some program's dialect."""
    separator, ends = draw(st.sampled_from(",;\t")), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    rows = [
        [f"s{k}", *fields] for k, fields in enumerate(draw(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5)))
    ]
    text = io.StringIO()
    writer = csv.writer(
        text,
        delimiter=separator,
        lineterminator="\n",
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    )
    writer.writerows([["Id", "Target", "note"], *rows])
    blank, tail = draw(st.sampled_from(["", "\n"])), draw(st.sampled_from(["", separator, 2 * separator]))
    lines = text.getvalue().replace("\n", tail + "\n" + blank)
    if draw(st.booleans()):
        lines = unicodedata.normalize("NFD", lines)
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    return rows, lines.replace("\n", ends).encode(encoding)


@given(dialect())
@fuzz
def test_a_table_says_the_same_in_every_dialect(tmp_path, made):
    rows, content = made
    (tmp_path / "x.csv").write_bytes(content)
    assert read_text_table(tmp_path / "x.csv").to_numpy().tolist() == rows


@given(st.data())
@fuzz
def test_a_damaged_table_has_its_own_fields_or_is_refused(tmp_path, data):
    rows, content = data.draw(dialect())
    (tmp_path / "x.csv").write_bytes(data.draw(damage(content)))
    plain = data.draw(st.booleans())
    try:
        frame = read_text_table(tmp_path / "x.csv", plain=plain)
    except BadTable as error:
        assert str(error)
    else:
        assert all(isinstance(field, str) and "\0" not in field for row in frame.to_numpy().tolist() for field in row)
        assert frame.columns.is_unique and len(frame.columns)
    outcome(read_submission, tmp_path / "x.csv")


@given(ID)
@fuzz
def test_an_id_never_leads_out_of_its_folder(tmp_path, Id):
    if outcome(lambda: check_ids([Id], "x.csv") or True):
        path = tmp_path / "images" / f"{Id}_green.tif"
        assert path.resolve().parent == (tmp_path / "images").resolve()
        path.parent.mkdir(exist_ok=True)
        path.touch()  # the file system accepts it
        assert [found.name for found in path.parent.iterdir()] == [path.name]
        path.unlink()


@given(st.lists(PRINTABLE | st.sampled_from(["0", "27", "0 25", "-1", "28", "٣", "1e1", " 1 "]), max_size=5))
@fuzz
def test_labels_are_parsed_or_refused(texts):
    targets = outcome(parse_targets, texts)
    if targets is not None:
        assert [set(map(int, text.split())) for text in texts] == [set(np.flatnonzero(row)) for row in targets]


# --- records of stages -------------------------------------------------------------------------------------

KEYS = st.sampled_from(["parameters", "inputs", "outputs", "Id", "source", "side", "stores", "out.txt"]) | PRINTABLE
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | PRINTABLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=12,
)


@given(
    st.one_of(
        st.binary(max_size=100),
        JSON.map(json.dumps).map(str.encode),
        st.just(b"[" * 100_000),
        st.fixed_dictionaries({"parameters": JSON, "inputs": JSON, "outputs": JSON}).map(json.dumps).map(str.encode),
    )
)
@fuzz
def test_sidecars_are_read_or_refused(tmp_path, content):
    write_text(tmp_path / "in.txt", "in")
    stage = Stage("0x_stage", tmp_path / "out.txt", {"a": 1}, {"in.txt": tmp_path / "in.txt"})
    stage.sidecar.write_bytes(content)
    outcome(stage.why_stale)


@given(st.data())
@fuzz
def test_damaged_sidecars_are_read_or_refused(tmp_path, data):
    write_text(tmp_path / "in.txt", "in")
    stage = Stage("0x_stage", tmp_path / "out.txt", {"a": 1}, {"in.txt": tmp_path / "in.txt"})
    write_text(stage.artifact, "out")
    stage.seal(Record(1))
    sidecar(stage.artifact).write_bytes(data.draw(damage(sidecar(stage.artifact).read_bytes())))
    outcome(stage.why_stale)


@given(st.one_of(st.binary(max_size=200), st.lists(JSON.map(json.dumps), max_size=4).map("\n".join).map(str.encode)))
@fuzz
def test_a_journal_gives_whole_records_only(tmp_path, content):
    (tmp_path / "journal.jsonl").write_bytes(content)
    for Id, record in read_journal(tmp_path / "journal.jsonl").items():
        assert record["Id"] == Id and record["source"] is not ... and isinstance(record["side"], int)


# --- arrays ------------------------------------------------------------------------------------------------


@st.composite
def array_header(draw):
    """Return an .npy whose header claims anything."""
    shape = draw(
        st.sampled_from(
            ["(2, 28)", "(10**9,)", "(1000000000, 28)", "(-1,)", "()", "(2,", "(True,)", "(99999999999999999,)"]
        )
    )
    kind = draw(
        st.sampled_from(
            ["'<f4'", "'|O'", "'<U36'", "'<U999999999'", "'V0'", "[('a', '<f8', (100000,))]", "'<M8[ns]'", "'x'"]
        )
    )
    order = draw(st.sampled_from(["True", "False", "1", "x"]))
    text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]))
    length = draw(st.sampled_from([len(text), 0, 65535]))
    return (
        b"\x93NUMPY"
        + version
        + length.to_bytes(2 if version[0] == 1 else 4, "little")
        + text
        + draw(st.binary(max_size=300))
    )


def as_npz(members: dict, compression=zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, part in members.items():
            archive.writestr(f"{name}.npy", part)
    return content.getvalue()


NPZ = st.dictionaries(
    st.sampled_from(["ids", "probs", "classes", "../x", ""]), array_header() | st.binary(max_size=50), max_size=4
)


@given(st.data())
@fuzz
def test_predictions_are_read_or_refused(tmp_path, data):
    path = tmp_path / "p.npz"
    save_predictions(path, ["a", "b"], np.random.default_rng(0).random((2, 28)))
    good = path.read_bytes()
    path.write_bytes(data.draw(damage(good) | NPZ.map(as_npz) | array_header() | st.binary(max_size=100)))
    found = outcome(load_predictions, path, "python 05_predict_oof.py")
    if found is not None:
        assert found[1].shape == (len(found[0]), 28) and 0 <= found[1].min(initial=0) <= found[1].max(initial=0) <= 1


def as_array(values) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


TABLE = (
    pd.DataFrame(np.eye(2, 28), columns=[f"p{c}" for c in range(28)]).assign(Id=["a", "b"]).to_csv(index=False).encode()
)


@given(st.data())
@fuzz
def test_predictions_from_anywhere_are_read_or_refused(tmp_path, data):
    write_text(tmp_path / "ids.csv", as_csv([["a", "0"], ["b", "0"]]))
    suffix, good = data.draw(st.sampled_from([(".csv", TABLE), (".npy", as_array(np.eye(2, 28)))]))
    path = tmp_path / f"p{suffix}"
    path.write_bytes(
        data.draw(damage(good) | array_header() | st.binary(max_size=100) | ROWS.map(as_csv).map(str.encode))
    )
    found = outcome(read_predictions, path, tmp_path / "ids.csv")
    if found is not None:
        assert found[1].shape == (len(found[0]), 28) and 0 <= found[1].min(initial=0) <= found[1].max(initial=0) <= 1
    outcome(read_groups, path, np.array(["a", "b"]))


def test_a_bomb_of_zeros_is_refused_before_it_is_inflated(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("ids.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 28)})
        for _ in range(1120):
            member.write(bytes(10**6))
    assert (tmp_path / "p.npz").stat().st_size < 2e6
    assert outcome(load_predictions, tmp_path / "p.npz", "") is None
    with pytest.raises(UserError, match="claims 1.1 GB of arrays; at most 0.3 GB are accepted"):
        load_predictions(tmp_path / "p.npz", "")


def test_an_archive_that_is_not_deflated_is_refused(tmp_path):  # zipfile inflates bzip2 and LZMA without a limit
    (tmp_path / "p.npz").write_bytes(as_npz({"ids.npy": b"x", "probs.npy": b"x"}, zipfile.ZIP_BZIP2))
    with pytest.raises(UserError, match="is compressed with a method other than deflate"):
        load_predictions(tmp_path / "p.npz", "")


def test_a_table_is_not_inflated(tmp_path):
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"Id,Target\n" + b"a,0\n" * 1000))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_labels(tmp_path / "x.csv.gz")


# --- images ------------------------------------------------------------------------------------------------


def originals(folder: Path) -> list[Path]:
    """Return real images of each kind, if available, and synthetic ones: small, 8 and 16 bit, grey and colour."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    tifffile.imwrite(folder / "a.tif", noise)
    tifffile.imwrite(folder / "b.tif", noise.astype(np.uint16) * 257, compression="zlib", predictor=True, tile=(16, 16))
    tifffile.imwrite(folder / "c.tif", noise, compression="lzw", byteorder=">", bigtiff=True)
    Image.fromarray(noise).save(folder / "d.png")
    Image.fromarray(noise.astype(np.uint16) * 257).save(folder / "e.png")
    Image.fromarray(np.stack([noise] * 3, axis=-1)).save(folder / "f.jpg")
    Image.fromarray(noise).save(folder / "g.jpg", progressive=True)
    write_tiff(folder / "h.tif", noise >> 4, bits=4, photometric=0, orientation=6, rows=20)
    write_tiff(folder / "i.tif", np.stack([noise] * 3, axis=-1), photometric=2, planar=2, fill_order=2, compression=8)
    write_tiff(folder / "j.tif", noise, photometric=3, table=np.arange(256)[:, None] * (257, 0, 0), subfiles=(0, 1))
    real = Path(os.environ.get("HPA_REAL_DATA", folder / "none"))
    kinds = ("kaggle_png/train/*_green.png", "external/images/*_blue.jpg", "kaggle_tiff/train_full_size/*_red.tif")
    return [*sorted(folder.iterdir()), *(path for kind in kinds for path in sorted(real.glob(kind))[:2])]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return [(path.suffix, path.read_bytes()) for path in originals(tmp_path_factory.mktemp("originals"))]


@given(st.data())
@fuzz
def test_images_are_decoded_or_refused(tmp_path, pictures, data):
    suffix, content = data.draw(st.sampled_from(pictures))
    if data.draw(st.integers(0, 19)) == 0:
        suffix = data.draw(st.sampled_from([".tif", ".png", ".jpg"]))  # may not match the content
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data.draw(damage(content)))
    rgb_coded = data.draw(st.booleans())
    image = outcome(read_channel, path, "yellow", rgb_coded)
    if image is not None:
        assert image.dtype in (np.uint8, np.uint16) and image.ndim == 2 and image.shape[0] == image.shape[1] <= 8192
        check_agreed(path, rgb_coded)


def check_agreed(path: Path, rgb_coded: bool) -> None:
    """Compare an accepted image with what tifffile's page and Pillow agree on, if both read it."""
    expected = agreed(path) if path.suffix == ".tif" else None
    if expected is None:
        return
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        bits, table = page.bitspersample, page.colormap.T >> 8 if page.photometric == 3 else None
    if table is not None:
        ramp = table_kind(table, 2**bits) == "ramp"
        expected = stretched(expected.astype(int), bits) if ramp else table[np.minimum(expected, len(table) - 1)]
    image = read_pixels(path, rgb_coded)
    expected = (
        expected[..., 0]
        if expected.ndim == 3 and image.ndim == 2 and (expected == expected[..., :1]).all()
        else expected
    )
    np.testing.assert_array_equal(image, expected)


@st.composite
def tiff_tags(draw):
    """Return tags of a TIFF for `write_tiff`, and its values, (16, 16) or (16, 16, n)."""
    bits, photometric = (
        draw(st.sampled_from([1, 2, 4, 5, 8, 8, 12, 16])),
        draw(st.sampled_from([0, 0, 1, 1, 1, 2, 2, 3, 3, 6])),
    )
    n = draw(st.sampled_from([3, 3, 3, 4])) if photometric == 2 else draw(st.sampled_from([1] * 9 + [2, 3]))
    seed = draw(st.integers(0, 99))
    values = np.random.default_rng(seed).integers(0, 2**bits, (16, 16) if n == 1 else (16, 16, n))
    table = {"table": draw(st.sampled_from(TABLES))(2**bits, np.random.default_rng(seed))} if photometric == 3 else {}
    extra = [(338, "H", draw(st.lists(st.integers(0, 2), min_size=1, max_size=2)))] if n in (2, 4) else []
    description, images = draw(st.sampled_from([(None, 1)] * 6 + DESCRIPTIONS))
    tags = {
        "planar": st.integers(1, 2),
        "orientation": st.integers(0, 9),
        "fill_order": st.integers(1, 2),
        "order": st.sampled_from("<>"),
        "compression": st.sampled_from([1, 8]),
        "rows": st.sampled_from([5, 16]),
        "subfiles": st.sampled_from([(0,)] * 12 + [(1,), (2,), (0, 1), (0, 1), (0, 0), (1, 0)]),
        "more": st.sampled_from([[]] * 9 + [[entry] for entry in FURTHER]).map(lambda more: more + extra),
    }
    return {
        "bits": bits,
        "photometric": photometric,
        "description": description,
        "images": images,
        **table,
        **{name: draw(values) for name, values in tags.items()},
    }, values


def spread(n):
    return np.arange(n)[:, None] * (65535 // (n - 1))


TABLES = [
    lambda n, _: spread(n) * (0, 1, 0),
    lambda n, _: spread(n)[::-1] * (1, 1, 1),
    lambda n, rng: rng.integers(0, 65536, (n, 3)),
    lambda n, rng: rng.integers(0, 65536, (n, 1)) * (1, 1, 1),
]
OME = (
    '<OME><Image><Pixels DimensionOrder="XYCZT" SizeX="16" SizeY="16" SizeC="1" SizeZ="1" SizeT="1" Type="uint8"/>'
    "</Image></OME>"
)
DESCRIPTIONS = [
    ('{"shape": [1, 16, 16]}', 1),
    ('{"shape": [16, 16, 1]}', 1),
    ('{"shape": [4, 16, 16], "truncated": true}', 4),
    ("ImageJ=1.54f\nimages=1\n", 1),
    ("ImageJ=1.54f\nimages=3\nslices=3\n", 3),
    ('{"shape": "x"}', 1),
    ("<OME></OME>", 1),
    (OME, 1),
]
FURTHER = [(317, "H", [1]), (317, "H", [2]), (339, "H", [1]), (339, "H", [2]), (262, "H", None), (279, "I", [0])]


@given(tiff_tags(), st.booleans())
@fuzz
def test_tags_of_tiffs_are_respected_or_refused(tmp_path, case, rgb_coded):
    tags, values = case
    path = tmp_path / "x.tif"
    write_tiff(path, values, **tags)
    image = outcome(read_pixels, path, rgb_coded)
    if image is None:
        return
    assert tags["subfiles"] in ((0,), (1,), (2,), (0, 1)) and (values.ndim == 2 or rgb_coded)
    assert tags["images"] == 1 or tags["compression"] == 8 or tags["bits"] not in (8, 16)
    check_agreed(path, rgb_coded)
    if tags["photometric"] != 3 and (317, "H", [2]) not in tags["more"]:
        expected = stretched(values, tags["bits"])
        expected = np.iinfo(expected.dtype).max - expected if tags["photometric"] == 0 else expected
        np.testing.assert_array_equal(image, turned(expected, tags["orientation"]))


# --- files with several channels ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """The same field as OME-TIFF, ImageJ TIFF, plain pages, and planes under one page; and as OME-Zarr."""
    folder = tmp_path_factory.mktemp("stacks")
    field = {"a": np.random.default_rng(0).integers(0, 256, (4, 40, 56), dtype=np.uint8)}
    for write in (clothes.ome_tiffs, clothes.imagej_tiffs, clothes.pages):
        write(folder, field)
    tifffile.imwrite(
        folder / "b.tif",
        field["a"],
        photometric="minisblack",
        metadata={"axes": "CYX", "channels": CHANNELS},
        truncate=True,
    )
    with contextlib.suppress(ImportError):
        clothes.ome_zarrs(folder, {"z": field["a"]}, pixel_size=0.1)
    return folder


def read_stack(path: Path) -> list[np.ndarray]:
    with opened_stack(path) as (header, decode):
        assert len(header.names) <= 64 and max(header.width, header.height) <= 8192
        return [decode(k) for k in range(min(4, len(header.names)))]


@given(st.data())
@fuzz
def test_stacks_are_decoded_or_refused(tmp_path, stacks, data):
    """Damage anywhere, or a number or name in the description changed."""
    source = data.draw(st.sampled_from(sorted(path for path in stacks.iterdir() if path.is_file())))
    content = source.read_bytes()
    if data.draw(st.booleans()):
        words = [word for word in re.findall(rb"[A-Za-z]+=\S{1,20}|\d+", content[:4000])] or [b""]
        word, new = data.draw(st.sampled_from(words)), data.draw(st.sampled_from([b"9" * 3, b"-1", b"1e9", b'"', b"<"]))
        content = content.replace(word, new.ljust(len(word))[: len(word)], 1)
    else:
        content = data.draw(damage(content))
    path = tmp_path / source.name
    path.write_bytes(content)
    planes = outcome(read_stack, path)
    assert planes is None or all(plane.ndim == 2 and plane.dtype in (np.uint8, np.uint16) for plane in planes)


@given(st.data())
@fuzz
def test_zarrs_are_decoded_or_refused(tmp_path, stacks, data):
    """Damage in one of the files of an OME-Zarr."""
    if not (stacks / "z.ome.zarr").is_dir():
        pytest.skip("zarr is not installed")
    folder = tmp_path / "z.ome.zarr"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stacks / "z.ome.zarr", folder)
    inner = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = inner.read_bytes()
    if data.draw(st.booleans()) and inner.name.startswith(".z"):
        words = re.findall(rb'"[^"]*"|[\d.]+|\[|\{', content)
        word = data.draw(st.sampled_from(words))
        new = data.draw(st.sampled_from([b"-1", b"1e9", b"[]", b"{}", b"null", b'"x"', b"999999999999"]))
        content = content.replace(word, new, 1)
    else:
        content = data.draw(damage(content))
    inner.write_bytes(content)
    planes = outcome(read_stack, folder)
    assert planes is None or all(plane.ndim == 2 and plane.dtype in (np.uint8, np.uint16) for plane in planes)


@given(st.data())
@fuzz
def test_stored_images_are_what_they_were_or_refused(tmp_path, data):
    size = data.draw(st.sampled_from([32, 300]))  # uncompressed, compressed
    planes = np.random.default_rng(size).integers(0, 256, (4, size, size), dtype=np.uint8)
    path = tmp_path / "x.tif"
    write_planes(path, planes)
    path.write_bytes(data.draw(damage(path.read_bytes())))
    read = outcome(read_planes, path, checksum(planes))
    assert read is None or (read == planes).all()
    part = outcome(read_planes, path, checksum(planes), (16, 0.5, 0))
    top = (size - 15) // 2
    assert part is None or (part == planes[:, top : top + 16, :16]).all()


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("wide.png", lambda path: png_header(path, 2**31 - 1, 1), "cannot be read|claims"),
        (
            "square.png",
            lambda path: png_header(path, 32000, 32000),
            "cannot be read .Image size .1024000000 pixels. exceeds limit",
        ),
        ("fair.png", lambda path: png_header(path, 9000, 9000), "claims 9000 x 9000 px; at most 8192 are accepted"),
        (
            "square.jpg",
            lambda path: jpeg_header(path, 32000),
            "cannot be read .Image size .1024000000 pixels. exceeds limit",
        ),
        (
            "square.tif",
            lambda path: tifffile.imwrite(path, shape=(32000, 32000), dtype=np.uint8),
            "claims 32000 x 32000",
        ),
        (
            "tiles.tif",
            lambda path: tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(16384, 16384), compression="zlib"),
            "claims 64 x 64 px",
        ),
        (
            "odd.tif",
            lambda path: tifffile.imwrite(path, np.zeros((64, 64), np.uint8), compression="lzma"),
            "is compressed as LZMA",
        ),
    ],
)
def test_a_header_of_a_billion_pixels_is_refused_before_memory_is_spent(tmp_path, name, make, message):
    make(tmp_path / name)
    assert outcome(read_channel, tmp_path / name, "green") is None
    with pytest.raises(BadImage, match=message):
        read_channel(tmp_path / name, "green")


def png_header(path: Path, width: int, height: int) -> None:
    """Write a small PNG whose header claims another size, with a correct checksum."""
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zipfile.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def jpeg_header(path: Path, side: int) -> None:
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0") + 5
    content[frame : frame + 4] = side.to_bytes(2, "big") * 2
    path.write_bytes(content)


def test_a_link_under_a_final_name_is_replaced_and_not_followed(tmp_path):
    write_json(tmp_path / "secret.json", 1)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "x.json").symlink_to(tmp_path / "secret.json")
    write_json(tmp_path / "work" / "x.json", 2)
    assert (tmp_path / "secret.json").read_text() == "1\n" and not (tmp_path / "work" / "x.json").is_symlink()
