import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.artifacts.files import write_json
from common.artifacts.layout import Layout
from common.artifacts.predictions import save_predictions
from common.artifacts.stage import sidecar
from common.classes import CLASS_NAMES
from common.errors import UserError
from common.score.members import check_networks, member_files, read_groups, read_predictions, short_names

IDS = np.array(["a", "b", "c"])
PROBS = np.random.default_rng(0).random((3, 28)).astype(np.float32)


COLUMNS = tuple(map(str, range(28)))


def table(columns=COLUMNS, probs=PROBS, ids=IDS):
    return pd.DataFrame(probs, columns=columns).assign(Id=ids)


def written(tmp_path, frame):
    frame.to_csv(tmp_path / "p.csv", index=False)
    return tmp_path / "p.csv"


def test_the_three_kinds_of_file_give_the_same(tmp_path):
    save_predictions(tmp_path / "p.npz", IDS, PROBS)
    np.save(tmp_path / "p.npy", PROBS)
    pd.DataFrame({"Id": IDS, "Predicted": ""}).to_csv(tmp_path / "ids.csv", index=False)
    for path in (tmp_path / "p.npz", written(tmp_path, table()), tmp_path / "p.npy"):
        ids, probs = read_predictions(path, tmp_path / "ids.csv")
        assert ids.tolist() == ["a", "b", "c"] and probs.dtype == np.float32
        np.testing.assert_array_equal(probs, PROBS)


@pytest.mark.parametrize("columns", [CLASS_NAMES, [f"p{c}" for c in range(28)], [f"class_{c:02d}" for c in range(28)]])
def test_columns_are_put_in_the_order_of_the_labels(tmp_path, columns):
    shuffled = np.random.default_rng(1).permutation(28)
    frame = table([columns[c] for c in shuffled], PROBS[:, shuffled])
    np.testing.assert_array_equal(read_predictions(written(tmp_path, frame))[1], PROBS)


@pytest.mark.parametrize("Id", ["NA", "nan", "null", "None", "001", "1e5", "TRUE"])
def test_ids_stay_text(tmp_path, Id):
    ids, probs = read_predictions(written(tmp_path, table(ids=["a", Id, "c"])))
    assert ids.tolist() == ["a", Id, "c"]
    np.testing.assert_array_equal(probs, PROBS)


def changed(row, column, value):
    frame = table().astype({"3": object})
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table().drop(columns="27"), "expected the column Id and 28 columns of probabilities, found Id and 27 others"),
        (table().assign(more=0), "found Id and 29 others"),
        (table().drop(columns="Id"), "found no Id and 28 others"),
        (table([f"x{c}y" for c in range(28)]), "expected columns named by class or label"),
        (table([*map(str, range(27)), "26b1"]), "expected columns named by class or label"),
        (table(ids=["a", "b", "a"]), "Ids that appear more than once:\n  a"),
        (table(ids=["a", "../b", "c"]), "not plain file names"),
        (
            changed(1, "3", 1.5),
            r"found NaN or values outside in 1 rows, for example:\n  b: 1.5 for Nucleoli fibrillar center",
        ),
        (changed(1, "3", -0.1), r"b: -0.1 for Nucleoli"),
        (changed(2, "3", np.nan), r"c: nan for Nucleoli"),
        (changed(2, "3", "high"), r"has text in its column 3, expected numbers \(line 4: 'high'\)"),
        (table().iloc[:0], "has no rows"),
    ],
)
def test_what_a_table_may_not_be(tmp_path, frame, message):
    with pytest.raises(UserError, match=message):
        read_predictions(written(tmp_path, frame))


@pytest.mark.parametrize("suffix", [".NPZ", ".Npy", ".CSV"])
def test_suffixes_are_read_in_any_case(tmp_path, suffix):
    written(tmp_path, table()).rename(tmp_path / "p.CSV")
    save_predictions(tmp_path / "p.npz", IDS, PROBS)
    (tmp_path / "p.npz").rename(tmp_path / "p.NPZ")
    np.save(tmp_path / "p.npy", PROBS)
    (tmp_path / "p.npy").rename(tmp_path / "p.Npy")
    (tmp_path / "ids.csv").write_text("Id\na\nb\nc\n")
    np.testing.assert_array_equal(read_predictions(tmp_path / f"p{suffix}", tmp_path / "ids.csv")[1], PROBS)


@pytest.mark.parametrize(
    ("value", "taken"), [(1 + 1e-6, 1), (1.00000536, 1), (-1e-9, 0), (-5e-6, 0), (1, 1), (0.5, 0.5)]
)
def test_rounding_outside_the_range_is_taken_as_its_end(tmp_path, value, taken):
    for kind in (np.float32, np.float64):
        probs = PROBS.astype(kind)
        probs[1, 3] = value
        np.save(tmp_path / "p.npy", probs)
        pd.DataFrame({"Id": IDS}).to_csv(tmp_path / "ids.csv", index=False)
        for path in (tmp_path / "p.npy", written(tmp_path, table(probs=probs))):
            found = read_predictions(path, tmp_path / "ids.csv")[1]
            assert found[1, 3] == taken and 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize(
    ("value", "told"), [(1.0001, "1.0001"), (-0.001, "-0.001"), (1 + 2e-5, "1.00002"), (np.inf, "inf"), (255, "255")]
)
def test_a_value_outside_is_told_in_full(tmp_path, value, told):
    with pytest.raises(UserError, match=f"\n  b: {told} for Nucleoli fibrillar center"):
        read_predictions(written(tmp_path, changed(1, "3", value)))


def test_ids_of_arrays_are_compared_in_composed_form_too(tmp_path):
    save_predictions(tmp_path / "p.npz", [unicodedata.normalize("NFD", "Malmö"), "b", "c"], PROBS)
    assert read_predictions(tmp_path / "p.npz")[0][0] == "Malmö"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (PROBS[:2], r"expected probabilities of shape \(3, 28\), found \(2, 28\)"),
        (PROBS[:, :27], r"found \(3, 27\)"),
        (PROBS * np.nan, "found NaN or values outside in 3 rows"),
        (PROBS.astype(object), "not a readable array"),
        (PROBS.astype(str), "expected numbers"),
    ],
)
def test_what_an_array_may_not_be(tmp_path, array, message):
    np.save(tmp_path / "p.npy", array, allow_pickle=True)
    pd.DataFrame({"Id": IDS}).to_csv(tmp_path / "ids.csv", index=False)
    with pytest.raises(UserError, match=message):
        read_predictions(tmp_path / "p.npy", tmp_path / "ids.csv")


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "p.npy", PROBS)
    with pytest.raises(UserError, match="has no Ids; name a CSV file"):
        read_predictions(tmp_path / "p.npy")
    with pytest.raises(UserError, match="p.pkl is missing"):
        read_predictions(tmp_path / "p.pkl")
    (tmp_path / "p.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="expected predictions as .npz, .csv or .npy"):
        read_predictions(tmp_path / "p.pkl")
    with pytest.raises(UserError, match="expected each file once"):
        member_files([tmp_path / "p.npy", tmp_path / "x" / ".." / "p.npy"], tmp_path, [], "oof")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/fold0_oof.npz", "runs/b/fold0_oof.npz"], ["a/fold0_oof.npz", "b/fold0_oof.npz"]),
        (["/x/a/p/oof.npz", "/x/b/p/oof.npz"], ["a/p/oof.npz", "b/p/oof.npz"]),
        (["runs/a.npz", "b.npz"], ["a.npz", "b.npz"]),
        (["/p.csv", "/x/p.csv"], ["/p.csv", "x/p.csv"]),
        (["/long/way/to/p.npy"], ["p.npy"]),
    ],
)
def test_members_are_named_by_what_tells_their_paths_apart(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_groups_are_matched_by_id(tmp_path):
    pd.DataFrame({"Id": ["c", "a", "b"], "group": ["x", "y", "y"]}).to_csv(tmp_path / "g.csv", index=False)
    assert read_groups(tmp_path / "g.csv", IDS).tolist() == ["y", "y", "x"]
    with pytest.raises(UserError, match="1 missing Ids:\n  d"):
        read_groups(tmp_path / "g.csv", np.array(["a", "d"]))


def test_predictions_of_networks_that_are_gone_are_refused(tmp_path):
    def sealed(part, networks):
        path = Layout(tmp_path).predictions("demo", part)
        write_json(sidecar(path), {"parameters": {}, "inputs": {}, "outputs": {}, "networks": networks})

    sealed("oof", ["a", "b"])
    check_networks(tmp_path, ["demo"], "test", "CURE")  # a missing file is another function's error
    for networks in (["a", "b"], ["b"], []):
        sealed("test", networks)
        check_networks(tmp_path, ["demo"], "test", "CURE")
    for networks in (["c", "d"], ["a", "c"]):
        sealed("test", networks)
        with pytest.raises(UserError, match="test.npz and .*oof.npz come from different networks: .*; run: CURE"):
            check_networks(tmp_path, ["demo"], "test", "CURE")
