"""Comparison of runs: differences are paired, wins count classes with samples, and the text names possible chance."""

import numpy as np
import pytest

from common.errors import UserError
from common.recipes import get_recipe
from common.report.runs import differing_settings
from common.score.compare import compare_runs, describe_comparison, paired_interval
from common.score.metrics import class_f1
from common.score.thresholds import cross_fit, repeated_folds
from tests.unit.test_thresholds import simulated

TARGETS, PROBS = simulated(400)
GROUPS = np.arange(400)
NOISE = np.random.default_rng(3).random(PROBS.shape).astype(np.float32)


def test_scores_are_those_of_each_run_by_itself():
    result = compare_runs(TARGETS, {"a": PROBS, "noise": NOISE}, GROUPS, "greedy")
    folds = repeated_folds(TARGETS, GROUPS)
    for run, probs in zip(result["runs"], (PROBS, NOISE), strict=True):
        alone = [class_f1(TARGETS, made) for made in cross_fit(TARGETS, probs, GROUPS, "greedy", folds=folds)]
        assert run["per_class"] == pytest.approx(np.mean(alone, axis=0))
        assert run["macro_f1"] == pytest.approx(np.mean(alone))
        assert run["interval"][0] <= run["macro_f1"] <= run["interval"][1]


def test_a_better_run_is_clearly_better_and_the_same_one_is_not():
    result = compare_runs(TARGETS, {"a": PROBS, "noise": NOISE, "again": PROBS}, GROUPS, "greedy")
    better, same, worse = result["differences"]
    assert (better["a"], better["b"], same["b"], worse["a"]) == ("a", "noise", "again", "noise")
    assert better["interval"][0] > 0 > worse["interval"][1]
    assert (same["difference"], same["interval"], same["a_wins"], same["b_wins"]) == (0, [0, 0], 0, 0)
    assert better["difference"] == -worse["difference"] and better["a_wins"] == worse["b_wins"] > better["b_wins"]
    assert [run["wins"] for run in result["runs"]] == [0, better["b_wins"], 0]  # a and its copy share what is theirs


def test_what_runs_share_is_no_part_of_a_differences_interval():
    near = np.clip(PROBS + np.float32(0.01) * (NOISE - 0.5), 0, 1)
    result = compare_runs(TARGETS, {"a": PROBS, "near": near}, GROUPS, "greedy")
    low, high = result["differences"][0]["interval"]
    alone = result["runs"][0]["interval"]
    assert high - low < 0.5 * (alone[1] - alone[0])


def test_classes_without_samples_are_nobodys():
    targets = TARGETS.copy()
    targets[:, 3:] = False
    result = compare_runs(targets, {"a": PROBS, "noise": NOISE}, GROUPS, "half")
    assert result["n_present"] == 3
    assert sum(run["wins"] for run in result["runs"]) <= 3


def test_an_interval_is_centred_on_the_difference():
    assert paired_interval(0.1, np.linspace(4, 6, 41)) == pytest.approx([0.1 - 0.95, 0.1 + 0.95])


def test_one_run_is_not_compared():
    with pytest.raises(UserError, match="expected at least two runs to compare, found a"):
        compare_runs(TARGETS, {"a": PROBS}, GROUPS, "half")


def test_text_has_the_best_run_first_and_says_what_may_be_chance():
    result = compare_runs(TARGETS, {"noise": NOISE, "a": PROBS, "again": PROBS}, GROUPS, "greedy")
    lines = describe_comparison(result, {"a": "facts of a"})
    assert lines[0].startswith("400 samples") and "greedy" in lines[0]
    assert lines[2].startswith("a ") and "facts of a" in lines[2]
    assert lines[-1].startswith("a - again: +0.000") and lines[-1].endswith("(may be chance)")
    assert "chance" not in lines[-3]


def test_settings_that_differ_are_shown_as_they_are_given():
    recipes = {"a": get_recipe("demo"), "b": get_recipe("demo", ["alpha=0.5", "buffers=64", "enlarge=true"])}
    assert differing_settings(recipes) == {
        "a": "enlarge=false buffers=256 alpha=0.9",
        "b": "enlarge=true buffers=64 alpha=0.5",
    }
    assert differing_settings({"a": recipes["a"]}) == {"a": "-"}
