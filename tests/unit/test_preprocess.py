"""Which stored images stage 01 makes again: none after an upgrade, all large ones for another --store."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from common.check import estimates
from common.check.inputs import Seen
from common.data import ingest
from common.data.images import read_planes
from common.data.ingest import Plan, preprocess_stage, space_needed, statistics_table
from common.data.options import IngestOptions
from common.recipes import Recipe
from tests.conftest import write_sample


def recipes_of(stores) -> dict[str, Recipe]:
    """Return recipes whose images are stored at these sizes."""
    return {store: Recipe(image_size=int(store), crop_size=32) for store in stores}


@pytest.fixture
def make(tmp_path):
    """Return a function that stores two samples as stage 01 does.

    It returns store -> table, and file -> time of change.
    """
    for Id in "ab":
        write_sample(tmp_path / "data" / "train_full_size", Id, size=304)
    pd.DataFrame({"Id": list("ab"), "Target": "0"}).to_csv(tmp_path / "data" / "train.csv", index=False)

    def run(raw=False, stores=("128", "300")):
        options = IngestOptions(recipes_of(stores), raw=raw)
        plan = ingest.make_plan(tmp_path / "data", tmp_path / "work", options, 1)
        plan = ingest.store(ingest.check(plan, 1), 1)
        files = {
            f"{path.parent.name}/{path.stem}": path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.tif")
        }
        return {store: statistics_table(plan.usable, store) for store in plan.stores}, files

    return run


def is_raw(path):
    return path.stat().st_size > 4 * 300 * 300


def test_another_kind_of_store_makes_the_large_images_again_and_changes_no_table(make, tmp_path):
    image = tmp_path / "work" / "images" / "300" / "a.tif"
    tables, first = make()
    assert not is_raw(image)
    for raw in (True, False):
        again, changed = make(raw)
        assert is_raw(image) == raw
        assert {name for name in first if first[name] != changed[name]} == {"300/a", "300/b"}
        assert all(table.equals(again[store]) for store, table in tables.items())
        assert read_planes(image, tables["300"]["crc"][0]).shape == (4, 300, 300)
        assert make(raw)[1] == changed
        first = changed


def test_what_a_run_does_not_make_stays_of_its_kind(make, tmp_path):
    make(True)
    make(False, ["128", "280"])
    files = make(False, ["128", "280"])[1]
    assert make(True)[1] == files and is_raw(tmp_path / "work" / "images" / "300" / "a.tif")


def test_stores_of_earlier_versions_are_taken_as_they_are(make, tmp_path):
    files = make()[1]
    journal = tmp_path / "work" / "images" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert all(line.pop("raw") == [] for line in lines)  # which they did not write
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert make()[1] == files
    stage = preprocess_stage(tmp_path, Plan(tmp_path, IngestOptions({}), []))
    assert stage.parameters == {"sizes": ["128"], "white_level": 65535, "keep_going": False, "enlarge": False}
    raw = preprocess_stage(tmp_path, Plan(tmp_path, IngestOptions({}, raw=True), []))
    assert raw.changes(stage.made_from()) == "store was absent, now raw"


def test_the_disk_is_asked_for_the_room_of_the_kind(make, tmp_path):
    assert space_needed([300], raw=True) == pytest.approx(4 * 300**2, rel=0.01)
    assert space_needed([300]) < space_needed([300], raw=True) / 2
    assert space_needed([128], raw=True) == space_needed([128])
    make()
    for raw, found in ((False, "stored images 0 MB"), (True, "stored images 1 MB")):
        options = IngestOptions(recipes_of(["300"]), raw=raw)
        plan = ingest.make_plan(tmp_path / "data", tmp_path / "work", options, None)
        seen = Seen(ingest.with_sizes(plan.recalled()), 0.1, {})
        (line,) = estimates.disk(SimpleNamespace(work=tmp_path / "work", folds=[0]), seen, [], {})
        assert found in line.found
