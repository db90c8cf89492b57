import numpy as np
import pandas as pd
import pytest

from common.classes import CLASS_NAMES
from common.data.folds import (
    HOLD_OUT,
    audit,
    audit_table,
    class_counts,
    describe_audit,
    fold_numbers,
    make_folds,
    oversampling_copies,
    stratified_group_folds,
    training_rows,
)
from common.data.labels import format_targets, parse_targets, read_labels
from common.errors import UserError

RNG = np.random.default_rng(0)


def table(n=300, n_groups=200):
    targets = RNG.random((n, 28)) < np.linspace(0.02, 0.3, 28)
    targets[:, 27] |= ~targets.any(axis=1)
    return pd.DataFrame(
        {
            "Id": [f"s{i}" for i in range(n)],
            "part": "train",
            "Target": format_targets(targets),
            "group": [f"g{g}" for g in RNG.integers(n_groups, size=n)],
            "kept": 1,
        }
    )


def test_groups_are_whole_and_folds_disjoint_and_complete():
    folds = make_folds(table(), 5, 4, 0)
    assert (folds.groupby("group")["fold"].nunique() == 1).all()
    assert sorted(folds["fold"].unique()) == [0, 1, 2, 3, 4]
    assert folds["Id"].is_unique and len(folds) == 300


def test_the_same_seed_gives_the_same_folds():
    data = table()
    assert make_folds(data, 3, 4, 1).equals(make_folds(data, 3, 4, 1))
    assert not make_folds(data, 3, 4, 1)["fold"].equals(make_folds(data, 3, 4, 2)["fold"])


def test_removed_samples_are_left_out():
    data = table()
    data.loc[:9, "kept"] = 0
    assert set(make_folds(data, 3, 4, 0)["Id"]) == set(data["Id"][10:])


def test_copies_follow_the_rarest_class():
    targets = np.zeros((111, 3), dtype=bool)
    targets[:100, 0] = targets[100:110, 1] = targets[110:, 2] = True
    targets[0, 1] = True  # counts 100, 11, 1: the median is 11
    copies = oversampling_copies(targets, max_copies=3)
    assert copies[[0, 1, 105, 110]].tolist() == [1, 1, 1, 3]
    assert oversampling_copies(targets, max_copies=10)[110] == 4  # ceil(sqrt(11 / 1))
    more = np.hstack([targets, np.zeros((111, 25), dtype=bool)])  # classes without samples are ignored
    assert (oversampling_copies(more, max_copies=10) == oversampling_copies(targets, max_copies=10)).all()
    assert oversampling_copies(targets & False, max_copies=10).tolist() == [1] * 111


def test_external_samples_are_for_training_only_unless_they_share_a_group():
    data = table(30, 30)
    data["group"] = data["Id"]
    data.loc[20:, "part"] = "external"
    data.loc[29, "group"] = "s0"
    folds = make_folds(data, 3, 4, 0).set_index("Id")["fold"]
    assert (folds.iloc[20:29] == -1).all() and folds["s29"] == folds["s0"] >= 0


def test_fewer_samples_than_folds_is_an_error():
    with pytest.raises(UserError, match="2 distinct samples cannot make 5 folds"):
        stratified_group_folds(np.ones((4, 28), dtype=bool), np.array(["a", "a", "b", "b"]), 5, 0)


def test_external_samples_are_stratified_on_request():
    data = table()
    data.loc[200:, "part"] = "external"
    folds = make_folds(data, 3, 4, 0, external="stratified")
    assert (folds["fold"] >= 0).all() and (folds.groupby("group")["fold"].nunique() == 1).all()
    shares = folds[folds["part"] == "external"]["fold"].value_counts() / 100
    assert shares.between(0.2, 0.5).all()


def test_a_held_out_part_is_whole_stratified_and_has_no_copies():
    folds = make_folds(table(), 4, 4, 0, hold_out=0.2)
    aside = folds["fold"] == -2
    assert 0.1 < aside.mean() < 0.3 and (folds["copies"][aside] == 1).all() and (folds["copies"] > 1).any()
    assert (folds.groupby("group")["fold"].nunique() == 1).all()
    assert fold_numbers(folds) == [0, 1, 2, 3]
    counts = parse_targets(folds["Target"])
    assert (counts[aside].sum(axis=0) > 0).all()


def test_the_audit_counts_what_must_be_even_and_what_must_be_zero():
    folds = make_folds(table(), 5, 4, 0)
    folds["Target"] = ["0 3"] + ["0"] * (len(folds) - 1)
    found = audit(folds)
    assert found["groups_split"] == found["copies_outside_training"] == 0
    assert sum(found["samples"].values()) == 300 and sum(found["positives"]["Nucleoplasm"].values()) == 300
    assert len(found["classes_missing_folds"]["Nucleoli fibrillar center"]) == 4
    lines = describe_audit(found)
    assert "groups split: 0; copies outside training: 0" in lines[2]
    assert lines[-1] == "warning: 1 classes are too rare for every fold: Nucleoli fibrillar center"
    counts = audit_table(found)
    assert list(counts.columns) == ["class", "fold0", "fold1", "fold2", "fold3", "fold4", "all"]
    assert counts["all"].tolist()[:4] == [300, 0, 0, 1]


def test_the_audit_sees_split_groups_and_copies_outside_training():
    folds = make_folds(table(), 3, 4, 0, hold_out=0.2)
    folds.loc[folds.index[folds["fold"] == -2][-1], "copies"] = 2
    folds.loc[0, ["group", "fold"]] = ["one", 0]
    folds.loc[1, ["group", "fold"]] = ["one", 1]
    found = audit(folds)
    assert found["groups_split"] >= 1 and found["copies_outside_training"] == 1
    assert "held out" in describe_audit(found)[0]


def test_the_real_labels_are_spread_evenly(real_data):
    labels = read_labels(real_data / "labels" / "train.csv")
    folds = make_folds(labels.assign(part="train", group=labels["Id"], kept=1), 5, 4, 0)
    targets = parse_targets(folds["Target"])
    for k in range(5):
        positives = targets[folds["fold"] == k].sum(axis=0)
        assert (positives > 0).all() and np.abs(positives - targets.sum(axis=0) / 5).max() < 1.01


@pytest.mark.parametrize("share", [0.1, 0.3, 0.4, 0.45, 0.5])
def test_the_share_that_is_held_out_is_the_one_asked_for(share):
    ids = [f"s{i}" for i in range(200)]
    table = pd.DataFrame(
        {"Id": ids, "part": "train", "Target": [str(i % 5) for i in range(200)], "group": ids, "kept": 1}
    )
    folds = make_folds(table, 2, 1, 0, hold_out=share)
    assert (folds["fold"] == HOLD_OUT).mean() == pytest.approx(share, abs=0.02)


def made_of(folds, targets):
    return pd.DataFrame(
        {
            "Id": [f"s{i}" for i in range(len(folds))],
            "Target": targets,
            "part": "train",
            "fold": folds,
            "group": [f"g{i}" for i in range(len(folds))],
            "copies": 1,
        }
    )


def test_the_audit_names_the_class_that_is_spread_worst():
    # class 3: 3 and 1 of 4; class 5: 1 and 1; class 7: 1 and 0; all others have none
    found = audit(made_of([0, 0, 0, 1, 1, 1], ["3", "3 5", "3 7", "3", "5", ""]))
    assert (found["worst_class"], found["worst_deviation"]) == (CLASS_NAMES[3], 1.0)
    assert found["classes_missing_folds"] == {CLASS_NAMES[7]: [1]}
    assert found["copies_outside_training"] == found["groups_split"] == 0
    assert found["samples"] == {"0": 3, "1": 3} and found["copies"] == {"1": 6}
    assert found["positives"][CLASS_NAMES[3]] == {"0": 3, "1": 1}


def test_each_place_is_counted_and_described():
    folds = made_of([0, 1, 1, -1, -1, -2], ["0", "0", "1", "2", "2", "0"])
    folds["copies"] = [1, 3, 1, 2, 1, 2]
    folds.loc[2, "group"] = "g0"
    found = audit(folds)
    assert found["samples"] == {"0": 1, "1": 2, "-1": 2, "-2": 1} and found["copies"] == {"1": 3, "2": 2, "3": 1}
    assert (found["groups_split"], found["copies_outside_training"]) == (1, 1)
    lines = describe_audit(found)
    assert "1, 2" in lines[0] and "2 for training only" in lines[0] and "1 held out" in lines[0]
    assert "3 1x, 2 2x, 1 3x" in lines[2] and "groups split: 1" in lines[2] and "copies outside training: 1" in lines[2]
    counts = audit_table(found)
    assert list(counts.columns) == ["class", "fold0", "fold1", "training_only", "held_out", "all"]
    assert counts.iloc[[0, 2], 1:].to_numpy().tolist() == [[1, 1, 0, 1, 3], [0, 0, 2, 0, 2]]


@pytest.mark.parametrize(
    ("n", "share", "message"),
    [
        (30, 0.001, "--hold-out 0.001 of 30 distinct samples is none; give a larger share"),
        (300, 0.001, "--hold-out 0.001: the smallest share is 0.01"),
    ],
)
def test_a_share_that_holds_nothing_out_is_refused(n, share, message):
    data = table(n)
    data["group"] = data["Id"]
    with pytest.raises(UserError, match=message):
        make_folds(data, 2, 1, 0, hold_out=share)


@pytest.mark.parametrize(("groups", "n"), [(["a"], 0), (["a"], 1), (["a", "a", "a"], 1)])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_of_one_distinct_sample_or_none_nothing_can_be_held_out(groups, n, share):
    data = table(len(groups)).assign(group=groups, part="train" if n else "external")
    with pytest.raises(UserError) as error:
        make_folds(data, 2, 1, 0, hold_out=share)
    assert str(error.value) == f"--hold-out {share:g} of {n} distinct samples is none; give a larger share"


def test_of_few_distinct_samples_the_nearest_share_is_held_out_and_the_rest_must_make_the_folds():
    data = table(6).assign(group=list("xxyyyy"))
    with pytest.raises(UserError, match="^1 distinct samples cannot make 2 folds"):  # half of two are held out
        make_folds(data, 2, 1, 0, hold_out=0.5)
    folds = make_folds(data.assign(group=list("xxyyzz")), 2, 1, 0, hold_out=0.2)  # a third, the smallest share of three
    assert sorted(folds["fold"]) == [HOLD_OUT, HOLD_OUT, 0, 0, 1, 1]


def test_samples_for_training_only_and_those_held_out_are_no_fold():
    folds = made_of([1, -1, 0, -2], ["0", "1", "2", "3"])
    assert fold_numbers(folds) == [0, 1] and fold_numbers(made_of([8, 1, 0, 9], ["0"] * 4)) == [0, 1, 8, 9]
    assert training_rows(folds, 0).tolist() == [True, True, False, False]
    more = made_of([1, -1, 0, -2, 1], ["0 5", "1", "2", "3", "5 7"])
    assert class_counts(more, 0).tolist() == [1, 1, 0, 0, 0, 2, 0, 1] + [0] * 20
    assert class_counts(more, 1).tolist() == [0, 1, 1] + [0] * 25
