"""Tables 1 to 3 from synthetic predictions: scores, gains, thresholds, layout, missing runs."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from common.artifacts.predictions import save_predictions
from common.data.labels import format_targets
from common.errors import UserError
from common.recipes import ablation_runs
from common.score import paper_tables
from common.score.thresholds import cross_fit, greedy_thresholds

SYSTEMS = {
    "resnet50": {
        "original": "resnet50-original",
        "customised": "resnet50-customised",
        "hard": "resnet50-hard",
        "eloss": "resnet50-eloss",
        "ta": "resnet50",
    },
    "gapnet_pl": {"eloss": "gapnet_pl"},
}
RUNS = [run for runs in SYSTEMS.values() for run in runs.values()]


def macro(targets, predicted):
    return f1_score(targets, predicted, average="macro", zero_division=0)


SKILL = np.linspace(1, 2.5, len(RUNS))


def make_work(work, n=120, n_folds=3, seed=0, skill=SKILL):
    """Write folds.csv and each run's out-of-fold files, with rows in another order; later runs are better."""
    rng = np.random.default_rng(seed)
    targets = rng.random((n, 28)) < np.linspace(0.02, 0.4, 28)
    targets[:, 5] = False
    targets[~targets.any(axis=1), 27] = True
    folds = pd.DataFrame(
        {
            "Id": [f"s{i}" for i in range(n)],
            "Target": format_targets(targets),
            "part": "train",
            "group": [f"g{i // 2}" for i in range(n)],
            "fold": np.arange(n) // 2 % n_folds,
            "copies": 1,
        }
    )
    folds.loc[[n - 2, n - 1], "fold"] = -1  # for training only
    work.mkdir()
    folds.to_csv(work / "folds.csv", index=False)
    probs = {
        run: 1 / (1 + np.exp(1 - rng.normal(size=targets.shape) - s * targets))
        for run, s in zip(RUNS, skill, strict=True)
    }
    for run in RUNS:
        for fold in range(n_folds):
            here = rng.permutation(np.flatnonzero(folds["fold"] == fold))
            save_predictions(work / "predictions" / run / f"fold{fold}_oof.npz", folds["Id"][here], probs[run][here])
    kept = (folds["fold"] >= 0).to_numpy()
    probs = {run: p[kept].astype(np.float32) for run, p in probs.items()}
    return folds[kept].reset_index(drop=True), targets[kept], probs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A work folder with all runs: its path, rows, targets, probabilities, scores and gains."""
    work = tmp_path_factory.mktemp("tables") / "work"
    rows, targets, probs = make_work(work)
    return work, rows, targets, probs, *paper_tables.score_systems(SYSTEMS, probs, rows)


def cell(scores, model, column, fold, value="macro_f1"):
    found = scores[(scores["model"] == model) & (scores["column"] == column) & (scores["fold"] == str(fold))]
    return found[value].item()


# --- scores and gains --------------------------------------------------------------------------------------


def slow_gain(targets, folds, after, before, n_draws, seed):
    """Draw one set of rows at a time, fold by fold, and score the drawn rows themselves."""
    rng = np.random.default_rng(seed)
    differences = np.zeros((n_draws, len(np.unique(folds))))
    for k, fold in enumerate(np.unique(folds)):
        places = np.flatnonzero(folds == fold)
        for draw in range(n_draws):
            rows = places[rng.integers(len(places), size=len(places))]
            scores = [np.mean([macro(targets[rows], p[rows]) for p in side]) for side in (after, before)]
            differences[draw, k] = scores[0] - scores[1]
    low, high = np.quantile(differences.mean(axis=1), [0.025, 0.975])
    gain = np.mean(
        [
            np.mean([macro(targets[folds == k], p[folds == k]) for p in after])
            - np.mean([macro(targets[folds == k], p[folds == k]) for p in before])
            for k in np.unique(folds)
        ]
    )
    return gain, low, high


def test_the_paired_gain_equals_a_slow_bootstrap():
    rng = np.random.default_rng(1)
    targets, folds = rng.random((90, 6)) < 0.25, np.repeat([0, 1, 4], [20, 30, 40])
    targets[:, 5] = False
    after = [targets ^ (rng.random(targets.shape) < 0.1) for _ in range(3)]
    before = [targets ^ (rng.random(targets.shape) < 0.2)]
    found = paper_tables.paired_gain(targets, folds, after, before, n_draws=60, seed=7)
    np.testing.assert_allclose(found, slow_gain(targets, folds, after, before, 60, 7), atol=1e-12)
    assert found[1] < found[0] < found[2]


def test_equal_columns_gain_nothing_for_certain():
    rng = np.random.default_rng(0)
    targets, predicted = rng.random((2, 60, 28)) < 0.2
    assert paper_tables.paired_gain(targets, np.arange(60) % 3, [predicted], [predicted], n_draws=20) == (0, 0, 0)
    repeated = paper_tables.paired_gain(targets, np.arange(60) % 3, [predicted] * 3, [predicted], n_draws=20)
    np.testing.assert_allclose(repeated, 0, atol=1e-12)


def test_pairing_narrows_the_interval():
    """Compare two nearly equal columns: with different draws, the interval would be as wide as the scores' own."""
    rng = np.random.default_rng(0)
    targets = rng.random((200, 28)) < 0.2
    before = targets ^ (rng.random(targets.shape) < 0.2)
    after = before.copy()
    after[0] = targets[0]
    _, low, high = paper_tables.paired_gain(targets, np.arange(200) % 2, [after], [before], 200)
    nothing = np.zeros_like(targets)
    _, wide_low, wide_high = paper_tables.paired_gain(targets, np.arange(200) % 2, [after], [nothing], 200)
    assert high - low < (wide_high - wide_low) / 5


def test_cells_equal_scikit_learn_at_half(made):
    _, rows, targets, probs, scores, _ = made
    folds = rows["fold"].to_numpy()
    for column, run in SYSTEMS["resnet50"].items():
        expected = [macro(targets[folds == k], probs[run][folds == k] >= 0.5) for k in range(3)]
        found = [cell(scores, "resnet50", column, k) for k in (0, 1, 2, "mean", "standard deviation")]
        np.testing.assert_allclose(found, [*expected, np.mean(expected), np.std(expected, ddof=1)])
        assert cell(scores, "resnet50", column, 1, "run") == run


def test_tuned_columns_are_cross_fitted_and_do_not_flatter(made):
    _, rows, targets, probs, scores, _ = made
    folds, groups = rows["fold"].to_numpy(), rows["group"].to_numpy()
    for column, run in (("te", "resnet50-eloss"), ("ta_te", "resnet50")):
        unseen = cross_fit(targets, probs[run], groups, "greedy")
        expected = [np.mean([macro(targets[folds == k], p[folds == k]) for p in unseen]) for k in range(3)]
        np.testing.assert_allclose([cell(scores, "resnet50", column, k) for k in range(3)], expected)
    # On noise, thresholds scored on the rows that they were found on would look too good.
    noise = np.random.default_rng(99).random(targets.shape).astype(np.float32)
    cells, _ = paper_tables.score_systems({"gapnet_pl": {"eloss": "noise"}}, {"noise": noise}, rows)
    flattering = noise >= greedy_thresholds(targets, noise)
    in_sample = np.mean([macro(targets[folds == k], flattering[folds == k]) for k in range(3)])
    assert cell(cells, "gapnet_pl", "te", "mean") < in_sample - 0.01


def test_each_column_gains_over_the_one_that_it_adds_to(made):
    _, rows, targets, probs, scores, gains = made
    assert gains[["model", "column", "against"]].to_numpy().tolist() == [
        ["resnet50", "customised", "original"],
        ["resnet50", "hard", "customised"],
        ["resnet50", "eloss", "hard"],
        ["resnet50", "ta", "eloss"],
        ["resnet50", "te", "eloss"],
        ["resnet50", "ta_te", "ta"],
        ["gapnet_pl", "te", "eloss"],
    ]
    for line in gains.itertuples():
        means = [cell(scores, line.model, column, "mean") for column in (line.column, line.against)]
        assert line.gain == pytest.approx(means[0] - means[1]) and line.low < line.gain < line.high
    assert set(gains["n_folds"]) == {3} and set(gains["n_samples"]) == {118}


def test_the_baseline_repeats_its_only_run(made):
    scores = made[4]
    assert set(scores["column"][scores["model"] == "gapnet_pl"]) == {"eloss", "ta", "te", "ta_te"}
    for fold in (0, 1, 2, "mean"):
        assert cell(scores, "gapnet_pl", "ta", fold) == cell(scores, "gapnet_pl", "eloss", fold)
        assert cell(scores, "gapnet_pl", "ta_te", fold) == cell(scores, "gapnet_pl", "te", fold)


def test_one_fold_has_no_standard_deviation(made):
    _, rows, _, probs, _, _ = made
    one = rows["fold"] == 1
    probs = {run: p[one] for run, p in probs.items()}
    scores, _ = paper_tables.score_systems(SYSTEMS, probs, paper_tables.validation_rows(rows, [1]))
    assert np.isnan(cell(scores, "resnet50", "original", "standard deviation"))
    assert cell(scores, "resnet50", "original", "mean") == cell(scores, "resnet50", "original", 1)
    assert cell(scores, "resnet50", "original", "mean", "paper") == 0.729


# --- the paper's figures -----------------------------------------------------------------------------------


def test_the_papers_figures():
    assert paper_tables.paper_cells("resnet50", "customised", range(5))[2] == 0.746
    assert paper_tables.paper_cells("resnet50", "customised", range(5))["mean"] == pytest.approx(0.7402)
    assert paper_tables.paper_cells("resnet50", "ta_te", [4])["mean"] == 0.767
    assert paper_tables.paper_cells("senet", "ta_te", range(5)) == {"mean": 0.789}
    assert paper_tables.paper_cells("senet", "customised", range(5)) == {"mean": 0.736}
    assert paper_tables.paper_cells("inceptionv4", "ta", [0]) == {"mean": 0.772}
    assert paper_tables.paper_cells("resnet101", "te", [0]) == {"mean": 0.784}
    assert paper_tables.paper_cells("gapnet_pl", "te", [0]) == {"mean": 0.765}
    assert paper_tables.paper_cells("densenet50", "hard", range(5)).keys() == {0, 1, 2, "mean", "standard deviation"}
    assert paper_tables.paper_cells("densenet50", "hard", range(5))[2] == 0.754  # its "random fold 3"
    assert paper_tables.paper_cells("densenet50", "hard", [3, 4]) == paper_tables.paper_cells("demo", "hard", [0]) == {}
    assert all(
        len(figures) == len(paper_tables.COLUMNS) for folds in paper_tables.PAPER.values() for figures in folds.values()
    )
    # Up to E-loss, only the customised SENet is worse than the column that it adds to.
    rows = [
        (model, figures[:4])
        for model, folds in paper_tables.PAPER.items()
        for figures in folds.values()
        if model != "gapnet_pl"
    ]
    assert [model for model, figures in rows if not np.all(np.diff(figures) > 0)] == ["senet"]


# --- files and their layout --------------------------------------------------------------------------------


def test_predictions_are_brought_into_the_order_of_the_folds(made):
    work, rows, _, probs, _, _ = made
    files = paper_tables.prediction_files(work, RUNS, [0, 1, 2])
    for run in RUNS:
        np.testing.assert_array_equal(paper_tables.load_run(files[run], rows, ""), probs[run])
    message = r"fold1_oof.npz is not for this folds.csv \(run: make it\): 1 unexpected Ids"
    with pytest.raises(UserError, match=message):
        paper_tables.load_run(files["resnet50"], rows.drop(index=2), "make it")


def test_folds_that_are_not_there_are_refused(made):
    rows = made[1]
    with pytest.raises(UserError, match="there is no fold 7; folds.csv has the folds 0, 1, 2"):
        paper_tables.validation_rows(rows, [0, 7])
    assert set(paper_tables.validation_rows(rows, [2, 0])["fold"]) == {0, 2}


def test_missing_runs_are_told_by_model(made):
    files = paper_tables.prediction_files(made[0], RUNS, [0, 1, 2, 3])
    assert paper_tables.missing_runs(SYSTEMS, paper_tables.prediction_files(made[0], RUNS, [0, 1, 2])) == {}
    lines = paper_tables.missing_runs(SYSTEMS, files)
    assert lines["gapnet_pl"] == ["With E-loss of gapnet_pl: gapnet_pl has no predictions of fold 3"]
    assert len(lines["resnet50"]) == 5


def test_markdown_lines_up_and_has_a_row_for_each_model_and_fold(made):
    _, rows, _, _, scores, gains = made
    text = paper_tables.markdown(scores, gains, paper_tables.notes(SYSTEMS, {}, rows))
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4
    assert all(len({len(line) for line in block}) == 1 for block in blocks)
    header, rule, *lines = [[part.strip() for part in line.strip("|").split("|")] for line in blocks[0]]
    assert header == ["Model", "Original", "paper", "Customised", "paper", "With hard sampler", "paper"]
    assert set("".join(rule)) == {"-", ":"}
    assert [line[0] for line in lines] == [
        f"resnet50 {row}" for row in ("(fold 0)", "(fold 1)", "(fold 2)", "mean", "standard deviation")
    ]
    ours = [f"{cell(scores, 'resnet50', column, 0):.3f}" for column in ("original", "customised", "hard")]
    assert lines[0] == ["resnet50 (fold 0)", ours[0], "0.737", ours[1], "0.750", ours[2], "0.761"]
    gapnet = [line for line in blocks[2] if "gapnet_pl (fold 0)" in line or "gapnet_pl mean" in line]
    assert [line.count("0.765") for line in gapnet] == [0, 3] and gapnet[0].count("  - ") == 3
    assert text.count("Without a positive in fold") == len(paper_tables.absent_notes(rows)) > 0
    assert "gapnet_pl has no separate run for TA" in text and "Missing" not in text


def test_absent_classes_are_counted_and_the_first_named():
    everything = " ".join(map(str, range(28)))
    rows = pd.DataFrame({"fold": [0, 1, 2, 3], "Target": ["0 1 2", everything, "2 1 0", everything]})
    assert paper_tables.absent_notes(rows) == [
        "Without a positive in fold 0, 2: 25 of the 28 classes, each of which counts as 0 there: "
        "Nucleoli fibrillar center, Nuclear speckles, Nuclear bodies, ..."
    ]


def test_wide_tables_end_each_model_with_its_gains(made):
    *_, scores, gains = made
    wide = paper_tables.wide_table(scores, gains, 3)
    assert list(wide.columns) == ["model", "fold", "ta", "ta_paper", "te", "te_paper", "ta_te", "ta_te_paper"]
    assert list(wide["fold"]) == ["0", "1", "2", "mean", "standard deviation", "gain", "gain low", "gain high"] * 2
    gain = wide[wide["fold"] == "gain"].set_index("model")
    expected = gains[(gains["model"] == "resnet50") & (gains["column"] == "ta")]
    assert gain.loc["resnet50", "ta"] == expected["gain"].item()
    assert gain.loc["resnet50", "ta_paper"] == pytest.approx(
        np.mean([0.774, 0.769, 0.773]) - np.mean([0.770, 0.766, 0.768])
    )
    assert np.isnan(gain.loc["gapnet_pl", "ta"])


def test_a_missing_run_is_blank_and_its_gains_are_left_out(made):
    _, rows, _, probs, _, _ = made
    some = {run: p for run, p in probs.items() if run != "resnet50-hard"}
    scores, gains = paper_tables.score_systems({"resnet50": SYSTEMS["resnet50"]}, some, rows)
    assert np.isnan(cell(scores, "resnet50", "hard", 0)) and np.isnan(cell(scores, "resnet50", "hard", "mean"))
    assert list(gains["column"]) == ["customised", "ta", "te", "ta_te"]
    assert paper_tables.markdown_table(scores, 1).count(" - |") == 5


def test_tables_of_nothing_still_have_their_columns(made):
    scores, gains = paper_tables.score_systems({"gapnet_pl": {"eloss": "gapnet_pl"}}, {}, made[1])
    assert len(gains) == 0 and list(gains.columns) == paper_tables.GAIN_FIELDS
    assert list(paper_tables.wide_table(scores, gains, 1).columns)[:3] == ["model", "fold", "original"]
    assert "## Gains" in paper_tables.markdown(scores, gains, [])


# --- the script --------------------------------------------------------------------------------------------


def test_the_runs_here_are_those_of_the_recipes():
    assert {model: ablation_runs(model) for model in SYSTEMS} == SYSTEMS
