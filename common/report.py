"""What the page shows: a section for each stage, made from what the stages wrote; a missing one says what to run."""

import numpy as np
import pandas as pd

from common import plots
from common.class_weights import effective_number_weights
from common.classes import CLASS_NAMES, N_CLASSES
from common.errors import UserError
from common.folds import HOLD_OUT, TRAIN_ONLY, class_counts, fold_numbers
from common.images import CHANNELS
from common.labels import parse_targets
from common.metrics import f1_from_counts
from common.page import Facts, Figure, Gallery, Heading, More, Note, Section, Table
from common.schedules import suggest_learning_rate
from common.work import Work, class_names

STAINS = dict(zip(CHANNELS, ("microtubules", "the protein", "nucleus", "reticulum"), strict=True))
SHOWN = 12  # cards of a gallery
NAMES = np.array(CLASS_NAMES)


def there(read):
    """Return what `read()` returns, None where its stage has not run."""
    try:
        return read()
    except UserError:
        return None


def shares(counts) -> np.ndarray:
    """Return counts as percentages of their sum."""
    counts = np.asarray(counts, dtype=float)
    return 100 * counts / max(1.0, counts.sum())


def section(work: Work, key: str, title: str, lead: str, make) -> Section:
    """Return a section, or its note where what it needs is missing."""
    try:
        return Section(key, title, lead, make(work))
    except UserError as error:
        return Section(key, title, lead, [], str(error))


def collect(work: Work) -> list[Section]:
    """Return all sections of the page."""
    return [section(work, *row) for row in (
        ("overview", "Overview", "What the stages have made so far, and the figures that matter most.", overview),
        ("data", "Data", "What there is to learn from. Counts are of samples; a sample may have several classes.", data),
        ("duplicates", "Duplicates", "Near-identical images by perceptual hashes of red, green and blue. One sample for each "
         "set of labels stays for training; nothing is removed from test.", duplicates),
        ("folds", "Folds", "How the samples are split for validation: whole groups of duplicates, every class evenly.", folds),
        ("training", "Training", "Each recipe's trainings, one a fold. Validation images are those of the fold.", training),
        ("predictions", "Predictions", "Out of fold: each sample is predicted by the network that did not see it in "
         "training.", predictions),
        ("scores", "Scores", "F1 is the harmonic mean of precision and recall; macro F1 is its mean over the 28 classes. "
         "Cross-fitted means that every sample was decided with thresholds found on other samples.", scores),
        ("errors", "Errors", "Where the ensemble is most certain and wrong, out of fold. Look at the images: is it the network "
         "or the label?", errors),
        ("submission", "Submission", "What is handed in: the classes of the test samples.", submission))]


# --- overview ----------------------------------------------------------------------------------------------

def overview(work: Work) -> list:
    blocks = [Table("Stages", stage_table(work), "Sections below are left out until their stage has run.",
                    {"rows": ",.0f", "seconds": ",.0f"}, wide=True)]
    found, facts = there(lambda: work.thresholds), {}
    if found:
        facts["macro F1, cross-fitted"] = f"{found['score_cross_fitted']:.3f}"
        facts["95 % interval"] = "{:.3f} to {:.3f}".format(*found["interval"])
        facts["mean of"] = ", ".join(found["recipes"])
    samples = there(lambda: work.samples)
    if samples is not None:
        facts["samples"] = f"{len(samples):,}"
    return [Facts(facts), *blocks] if facts else blocks


def stage_table(work: Work) -> pd.DataFrame:
    """Return a row a stage: what it made, from what is there now or not, rows, seconds."""
    recipes = there(lambda: work.recipes) or []
    files = lambda part: {recipe: f"predictions/{recipe}/{part}.npz" for recipe in recipes}  # noqa: E731
    rows = [("01 preprocess", "samples.csv", {}), ("02 dedup", "duplicates.csv", {"samples.csv": "samples.csv"}),
            ("03 make folds", "folds.csv", {"duplicates.csv": "duplicates.csv"}),
            *[("04 train", f"runs/{recipe}/fold{fold}/best.pt", {"folds.csv": "folds.csv"})
              for recipe, logs in (there(lambda: work.runs) or {}).items() for fold in logs],
            *[("05 predict", path, {}) for path in files("oof").values()],
            ("06 thresholds", "thresholds.json", {"folds.csv": "folds.csv", **files("oof")}),
            ("07 ensemble", "submission.csv", {"thresholds.json": "thresholds.json", **files("test")}),
            ("09 tables", "tables/tables.md", {"folds.csv": "folds.csv"})]
    lines = []
    for stage, path, inputs in rows:
        state, record = work.state(path, inputs)
        lines.append((stage, path, state, record.get("rows", np.nan), record.get("seconds", np.nan)))
    return pd.DataFrame(lines, columns=["stage", "main file", "state", "rows", "seconds"])


# --- data --------------------------------------------------------------------------------------------------

def data(work: Work) -> list:
    samples, stages = work.samples, count_stages(work)
    parts = [part for part in ("train", "test", "external") if (samples["part"] == part).any()]
    targets = parse_targets(samples.loc[samples["part"] != "test", "Target"])
    order = np.argsort(-targets.sum(axis=0), kind="stable")
    sizes = pd.crosstab(samples["side"], samples["part"])[parts].reset_index().rename(columns={"side": "side, px"})
    counts = pd.DataFrame({"class": NAMES, **stages}).iloc[order]
    channels = next(reversed(work.stores.values()))
    return [
        Facts({**{f"{part} samples": f"{(samples['part'] == part).sum():,}" for part in parts},
               "classes with samples": f"{targets.any(axis=0).sum()} of {N_CLASSES}",
               "labels a sample": f"{targets.sum(axis=1).mean():.2f}", "stored at": f"{', '.join(work.stores)} px"}),
        Figure("Samples of each class", plots.dots("classes", list(NAMES[order]), {
            name: np.where(values > 0, values, np.nan)[order] for name, values in stages.items()}, "samples", log=True),
            "Look for classes at the far left: they decide macro F1, and their scores are uncertain. "
            "Copies are how often a sample appears in an epoch of training."),
        Table("Samples of each class", counts, "Sort by a column to find the rarest class, or the one that lost most."),
        *image_blocks(samples, parts, targets, sizes, channels),
        *co_occurrence(targets, order),
        contact_sheet(work, targets, samples.loc[samples["part"] != "test", "Id"].to_numpy())]


def count_stages(work: Work) -> dict[str, np.ndarray]:
    """Return samples of each class (28,): labelled, after stage 02, and in training with the copies of stage 03."""
    labelled = work.samples[work.samples["part"] != "test"]
    counts = {"labelled": parse_targets(labelled["Target"]).sum(axis=0)}
    duplicates, folds = there(lambda: work.duplicates), there(lambda: work.folds)
    if duplicates is not None:
        counts["without duplicates"] = parse_targets(duplicates.loc[duplicates["kept"] == 1, "Target"]).sum(axis=0)
    if folds is not None:
        used = folds[folds["fold"] != HOLD_OUT]
        counts["with copies"] = used["copies"].to_numpy() @ parse_targets(used["Target"])
    return counts


def image_blocks(samples, parts, targets, sizes, channels) -> list:
    """Show labels a sample, sizes of the sources, and brightness of the channels."""
    labels = np.bincount(targets.sum(axis=1))[1:]
    part_of = samples.set_index("Id")["part"].reindex(channels["Id"]).to_numpy()
    groups = [f"{channel}\n{STAINS[channel]}" for channel in CHANNELS]
    means = {part: [channels[f"mean_{channel}"][part_of == part].to_numpy() for channel in CHANNELS] for part in parts}
    table = pd.DataFrame([{"channel": f"{channel} ({STAINS[channel]})", "mean": channels[f"mean_{channel}"].mean(),
                           "spread within an image": channels[f"std_{channel}"].mean(),
                           "black, %": 100 * channels[f"zeros_{channel}"].mean(),
                           "saturated, %": 100 * channels[f"saturated_{channel}"].mean()} for channel in CHANNELS])
    return [
        Figure("Labels a sample", plots.bars("labels", [str(n) for n in range(1, len(labels) + 1)], labels,
                                             "labels of a sample", "samples"),
               "Most samples should have one to three. A network that predicts many more or fewer has wrong thresholds."),
        Figure("Brightness of the channels", plots.boxes("channels", groups, means, "mean of an image, 0 to 1"),
               "Boxes hold the middle half of the images, whiskers 90 %. Look for parts that differ: a network meets in test "
               "what it was not trained on."),
        Table("Size of the source images", sizes, "Samples by the side of their source; all are shrunk to what recipes need.",
              {"side, px": "d"}),
        Table("Channels", table, "Means over the stored images, 0 to 1. Much black or saturation means a lost signal.",
              {"saturated, %": ".2f", "black, %": ".1f"})]


def co_occurrence(targets, order) -> list:
    """Show which classes come together, as shares and as the pairs farthest from chance."""
    together = targets.astype(float).T @ targets.astype(float)
    counts = np.diag(together).copy()
    share = np.divide(together, counts[:, None], out=np.full(together.shape, np.nan), where=counts[:, None] > 0)
    np.fill_diagonal(share, np.nan)
    first, second = np.triu_indices(N_CLASSES, 1)
    chance = counts[first] * counts[second] / len(targets)
    pairs = pd.DataFrame({"class": NAMES[first], "and": NAMES[second], "together": together[first, second].astype(int),
                          "by chance": chance, "ratio": together[first, second] / np.maximum(chance, 1e-9)})
    pairs = pairs[pairs["together"] > 0].sort_values("together", ascending=False, kind="stable").head(40)
    return [
        Figure("Classes that come together", plots.matrix("together", share[np.ix_(order, order)], list(NAMES[order]),
                                                          "share of the row's samples that also have the column's class"),
               "Bright cells are pairs to expect. A rare class in a bright cell may be learnt by way of its companion.", wide=True),
        Table("Most frequent pairs of classes", pairs, "By chance: as often as if labels were independent. A ratio far above 1 "
              "is a real companion.", {"by chance": ".1f", "ratio": ".2f"}, wide=True)]


def contact_sheet(work: Work, targets, ids) -> Gallery:
    """Show a sample of each class, one with few other labels, rare classes first."""
    chosen = {}
    for c in np.argsort(targets.sum(axis=0), kind="stable"):
        rows = [row for row in np.flatnonzero(targets[:, c]) if row not in chosen.values()]
        if rows:
            chosen[c] = min(rows, key=lambda row: targets[row].sum())
    cards = []
    for c, row in chosen.items():
        others = ", ".join(NAMES[targets[row] & (np.arange(N_CLASSES) != c)])
        cards.append(work.card([ids[row]], [NAMES[c], f"with {others}" if others else "alone"]))
    return Gallery("A sample of each class", cards, "Red microtubules, green the protein, blue nucleus, yellow reticulum. Look for "
                   "the green: its place is the class.")


# --- duplicates --------------------------------------------------------------------------------------------

def duplicates(work: Work) -> list:
    table, pairs = work.duplicates, work.pairs
    groups = table.groupby("near_group").agg(samples=("Id", "size"), kept=("kept", "sum"),
                                             labels=("Target", lambda texts: " | ".join(sorted(set(map(class_names, texts))))))
    groups = groups[groups["samples"] > 1].sort_values("samples", ascending=False, kind="stable")
    apart = pairs[(pairs["part"] == "test") ^ (pairs["other_part"] == "test")]
    blocks = [Facts({"groups": f"{len(groups):,}", "left out of training": f"{(table['kept'] == 0).sum():,}",
                     "near-identical pairs": f"{len(pairs):,}", "pairs of test and labelled samples": f"{len(apart):,}"})]
    if pairs.empty:
        return [*blocks, Note("No two samples are near-identical.")]
    bits = np.bincount(pairs["bits"].astype(int))
    return [
        *blocks,
        Figure("How close the pairs are", plots.bars("bits", [str(n) for n in range(len(bits))], bits, "largest distance of the "
               "three channels, bits of 64", "pairs"),
               "Look for a gap before the right end. Without one the limit may be too wide; duplicate_pairs.png shows the "
               "nearest pairs that do not count."),
        Table("Groups", groups.reset_index().rename(columns={"near_group": "first sample"}).head(200),
              "The largest first. Labels that differ within a group are separated by a bar."),
        *[Gallery(title, [pair_card(work, pair) for pair in some.head(SHOWN // 2).itertuples()], text) for title, some, text in (
            ("Closest pairs", pairs, "They should be the same picture."),
            ("Farthest pairs that count", pairs[SHOWN // 2:][::-1], "If these show different cells, lower the threshold."),
            ("Pairs whose labels differ", pairs[pairs["agreement"] < 1].sort_values("agreement", kind="stable"),
             "The same picture with other labels: at least one of them may be wrong."),
            ("Matches between test and labelled samples", apart, "The label is known for these test samples, and the score on "
             "them flatters.")) if len(some)]]


def pair_card(work: Work, pair):
    """Show two images with their distances, labels and Ids."""
    first, second = (class_names(text) if part != "test" else "test" for text, part in
                     ((pair.Target, pair.part), (pair.other_Target, pair.other_part)))
    return work.card([pair.Id, pair.other_Id], [first if first == second else f"{first} | {second}",
                     f"bits apart: red {pair.red}, green {pair.green}, blue {pair.blue}"])


# --- folds -------------------------------------------------------------------------------------------------

def folds(work: Work) -> list:
    table = work.folds
    numbers, targets, fold = fold_numbers(table), parse_targets(table["Target"]), table["fold"].to_numpy()
    positives = np.stack([targets[fold == k].sum(axis=0) for k in numbers])
    away = positives - positives.mean(axis=0)
    order = np.argsort(-positives.sum(axis=0), kind="stable")
    aside = {name: (fold == place).sum() for name, place in (("for training only", TRAIN_ONLY), ("held out", HOLD_OUT))}
    columns = {f"fold {k}": row for k, row in zip(numbers, positives, strict=True)}
    counts = pd.DataFrame({"class": NAMES, **columns, **{name: targets[fold == place].sum(axis=0) for name, place in
                          (("for training only", TRAIN_ONLY), ("held out", HOLD_OUT)) if aside[name]},
                          "off an even share": np.abs(away).max(axis=0)}).iloc[order]
    lacking = NAMES[(positives == 0).any(axis=0) & positives.any(axis=0)]
    split = (table.groupby("group")["fold"].nunique() > 1).sum()
    return [
        Facts({"samples a fold": ", ".join(f"{(fold == k).sum():,}" for k in numbers),
               **{name: f"{n:,}" for name, n in aside.items() if n}, "groups split": str(split),
               "copies of a sample": f"1 to {table['copies'].max()}"}),
        *([Note(f"Too rare for a positive in every fold: {', '.join(lacking)}. Their scores hang on few samples.")]
          if len(lacking) else []),
        Figure("How even the folds are", plots.dots("folds", list(NAMES[order]), {
            name: away[k][order] for k, name in enumerate(columns)}, "positives more than an even share", reference=0, filled=False),
            "Every mark should be within a few samples of 0; a class far off is validated on too few or too many."),
        Table("Positives of each class", counts, "Samples that have the class.", {"off an even share": ".1f"})]


# --- training ----------------------------------------------------------------------------------------------

def training(work: Work) -> list:
    blocks = [Table("Trainings", run_table(work), "Epochs stop when a cycle gains less than the recipe asks for. The best epoch is "
                    "chosen by macro F1 at a threshold of 0.5.", {"seconds an epoch": ".1f", "minutes": ".1f"}, wide=True)]
    for recipe, logs in work.runs.items():
        starts = {log["start"].iloc[0]: fold for fold, log in logs.items() if "start" in log}
        blocks += [Heading(recipe), *[Note(f"Started {start}.") for start in starts], *curves(recipe, logs), *finder(work, recipe), *hard_mix(work, recipe),
                   *class_weights(work, recipe)]
    return blocks


def run_table(work: Work) -> pd.DataFrame:
    rows = []
    for recipe, logs in work.runs.items():
        for fold, log in logs.items():
            record = work.run_record(recipe, fold)
            seconds = log["seconds"] + (log["valid_seconds"].fillna(0) if "valid_seconds" in log else 0)
            best = log["macro_f1"].idxmax() if "macro_f1" in log else None
            rows.append({"recipe": recipe, "fold": fold, "state": "finished" if record else "under way", "epochs": len(log),
                         "best macro F1": np.nan if best is None else log["macro_f1"][best],
                         "in epoch": pd.NA if best is None else int(log["epoch"][best]),
                         "seconds an epoch": seconds.mean(), "minutes": seconds.sum() / 60})
    return pd.DataFrame(rows)


def curves(recipe: str, logs: dict[int, pd.DataFrame]) -> list[Figure]:
    """Show loss, macro F1 and learning rate over the epochs."""
    loss, score = {}, {}
    for k, (fold, log) in enumerate(logs.items()):
        loss[f"fold {fold} train"] = (log["epoch"], log["train_loss"], k)
        seen = log.dropna(subset=["valid_loss"]) if "valid_loss" in log else log[:0]
        if len(seen):
            loss[f"fold {fold} valid"] = (seen["epoch"], seen["valid_loss"], k)
            score[f"fold {fold}"] = (seen["epoch"], seen["macro_f1"], k)
    longest = max(logs.values(), key=len)
    restarts = longest["epoch"][longest["cycle"].diff() > 0] - 0.5
    at = {"xlabel": "epoch", "verticals": restarts}
    return [
        Figure("Loss", plots.lines(f"loss {recipe}", loss, ylabel="E-loss of a sample", height=3.4, dashed=[
            name for name in loss if name.endswith("train")], **at),
            "Both should fall. A validation loss (solid) that rises while the training loss (dashed) falls means overfitting. "
            "Dotted lines are restarts. Training counts the hardest samples only and crops, so the two are not on one scale."),
        Figure("Macro F1", plots.lines(f"score {recipe}", score, ylabel="macro F1 at 0.5", ylim=(0, None), **at),
               "It should end near its highest point. A drop after a restart (dotted) is normal, and should be made good "
               "within the cycle."),
        Figure("Learning rate", plots.lines(f"rate {recipe}", {"at the end of the epoch": (longest["epoch"],
               longest["learning_rate"])}, ylabel="learning rate of the head", ylim=(0, None), **at),
               "The schedule as it was: with cycles down a cosine, and back to the top at each restart (dotted).")]


def finder(work: Work, recipe: str) -> list[Figure]:
    """Show the curves of the learning rate finder, with their lowest points and the rate that was used."""
    tables = {fold: table.dropna() for fold, table in work.run_tables(recipe, "lr_find.csv").items()}
    if not tables:
        return []
    series = {f"fold {fold}": (table["learning_rate"], table["smoothed"], k) for k, (fold, table) in enumerate(tables.items())}
    fold, table = next(iter(tables.items()))
    best = suggest_learning_rate(list(table["learning_rate"]), list(table["loss"]))
    place = (table["learning_rate"] - best).abs().idxmin()
    used = work.run_record(recipe, fold).get("learning_rates", [])[-1:]
    top = 1.15 * max(table["smoothed"].iloc[0] for table in tables.values())
    return [Figure("Learning rate finder", plots.lines(
        f"finder {recipe}", series, "learning rate, growing a batch at a time", "E-loss, smoothed", logx=True, verticals=used,
        marks={f"lowest, fold {fold}: {best:.2g}": (best, table["smoothed"][place])}, ylim=(0, top)),
        "The mark is the highest rate at which the loss still falls: an upper limit. "
        + (f"The dotted line is the rate used, {used[0]:.2g}; it should lie to the left of the mark." if used else ""))]


def hard_mix(work: Work, recipe: str) -> list[Figure]:
    """Show which classes the hard sampler keeps more of than it sees."""
    tables = work.run_tables(recipe, "hard_classes.csv").values()
    if not tables:
        return []
    sums = pd.concat(tables).groupby("class")[["ranked", "kept"]].sum().reindex(CLASS_NAMES)
    sums = sums[sums["ranked"] > 0]
    seen, kept = shares(sums["ranked"]), shares(sums["kept"])
    order = np.argsort(-kept / seen, kind="stable")
    return [Figure("What the hard sampler learns from", plots.dots(
        f"hard {recipe}", list(sums.index[order]), {"share seen": seen[order], "share kept": kept[order]}, "share of all labels, %",
        log=True), "All folds and epochs together; the class that gains most is at the top. Filled marks right of the hollow ones "
        "are classes that are learnt from more than they are seen; far to the right, their labels may be wrong.")]


def class_weights(work: Work, recipe: str) -> list[Figure]:
    """Show the weights of the E-loss in the first finished fold."""
    finished = [(fold, found) for fold in work.runs[recipe] if (found := there(lambda: work.run_recipe(recipe, fold)))]  # noqa: B023
    if not finished or finished[0][1].class_weights == "none":
        return []
    fold, settings = finished[0]
    counts = class_counts(work.folds, fold)
    weights = effective_number_weights(counts, settings.alpha, settings.class_weights)
    order = np.argsort(-weights, kind="stable")
    return [Figure("E-loss weights", plots.dots(
        f"weights {recipe}", [f"{NAMES[c]} ({counts[c]})" for c in order], {"weight": weights[order]}, "weight of the class in the loss",
        log=True), f"Fold {fold}, alpha {settings.alpha:g}; training samples in brackets. Rare classes weigh more; the higher alpha "
        "is, the more so. If all are alike, alpha is too low to matter.")]


# --- predictions -------------------------------------------------------------------------------------------

GRID = np.round(np.arange(0.02, 0.99, 0.02), 2)


def predictions(work: Work) -> list:
    from sklearn.metrics import average_precision_score

    rows, targets, probs = work.oof
    precision = np.array([average_precision_score(target, prob) if target.any() else np.nan
                          for target, prob in zip(targets.T, probs.T, strict=True)])
    present = [int(c) for c in np.argsort(precision, kind="stable") if targets[:, c].any()]
    table = pd.DataFrame({"class": NAMES, "positives": targets.sum(axis=0), "expected": probs.sum(axis=0),
                          "average precision": precision, "threshold": work.cuts}).iloc[present]
    panels = [class_figure(work, c, targets[:, c], probs[:, c], precision[c]) for c in present]
    return [
        Facts({"samples": f"{len(rows):,}", "mean of": ", ".join(work.recipes),
               "mean average precision": f"{np.nanmean(precision):.3f}"}),
        calibration(targets, probs),
        Table("Probabilities of each class", table, "Expected is the sum of the probabilities: far from the number of positives, the "
              "class is over- or underrated. Average precision needs no threshold.", {"expected": ".1f", "threshold": ".2f"}),
        Heading("Class by class, the weakest first"),
        Note("Left, precision against recall: the higher the better; the dotted line is chance. Right, what a threshold (upright "
             "line) would give: F1 should be at its top there, and flat, so that another set of samples would have it too."),
        *panels[:6],
        *([More(f"The other {len(panels) - 6} classes", panels[6:])] if len(panels) > 6 else [])]


def class_figure(work: Work, c: int, target, prob, precision: float) -> Figure:
    """Show a class's precision and recall, against each other and against the threshold."""
    from sklearn.metrics import precision_recall_curve

    along, recall, _ = precision_recall_curve(target, prob, drop_intermediate=True)
    some = np.unique(np.linspace(0, len(recall) - 1, 80).round().astype(int))
    called, right = ((GRID <= values[:, None]).sum(axis=0) for values in (prob, prob[target]))
    curves = {"precision": np.divide(right, called, out=np.full(len(GRID), np.nan), where=called > 0),
              "recall": right / target.sum(), "F1": 2 * right / (called + target.sum())}
    predicted = prob >= work.cuts[c]
    here = f1_from_counts((target & predicted).sum(), (~target & predicted).sum(), (target & ~predicted).sum())
    return Figure(NAMES[c], plots.class_panel(f"class {c}", recall[some], along[some], GRID, curves, work.cuts[c], target.mean()),
                  f"{target.sum():,} positives; average precision {precision:.2f}, by chance {target.mean():.2f}. F1 is {here:.2f} at "
                  f"the threshold {work.cuts[c]:.2f}, and {curves['F1'].max():.2f} at best.")


def calibration(targets, probs) -> Figure:
    """Show how often a class is there where it is predicted with a probability."""
    bins = np.minimum((probs * 10).astype(int), 9).ravel()
    counts = np.bincount(bins, minlength=10)
    mean, seen = (np.bincount(bins, values.ravel(), minlength=10) / np.maximum(1, counts) for values in (probs, targets))
    used = counts >= 10
    return Figure("Calibration", plots.lines("calibration", {"all classes together": (mean[used], seen[used]),
                  "perfect": (np.array([0, 1]), np.array([0, 1]), 5)}, "predicted probability", "share that has the class",
                  dashed=["perfect"], xlim=(0, 1), ylim=(0, 1)),
                  "On the dashed line a probability means what it says. Above it the networks are too careful, below it too sure. "
                  f"Tenths of the range with fewer than 10 predictions are left out; {100 * counts[0] / counts.sum():.0f} % of "
                  "all predictions are below 0.1.")


# --- scores ------------------------------------------------------------------------------------------------

def scores(work: Work) -> list:
    found = work.thresholds
    low, high = found["interval"]
    facts = {"macro F1, cross-fitted": f"{found['score_cross_fitted']:.3f}", "95 % interval": f"{low:.3f} to {high:.3f}",
             "on the rows of the search": f"{found['score_in_sample']:.3f}", "at 0.5 for all": f"{found['score_at_half']:.3f}",
             "samples": f"{found['n_samples']:,}"}
    if "score_held_out" in found:
        facts["held out"] = "{:.3f} ({:.3f} to {:.3f})".format(found["score_held_out"], *found["interval_held_out"])
    table = pd.DataFrame(found["per_class"]).rename(columns={"f1_cross_fitted": "F1, cross-fitted", "f1_in_sample": "F1, own rows",
                                                             "interval": "95 % interval"})
    return [Facts(facts), per_class_figure(table),
            Table("F1 of each class", table[[name for name in ("class", "positives", "threshold", "F1, cross-fitted", "95 % interval",
                                                              "F1, own rows") if name in table]],
                  "Sort by positives: do the rare classes have the low scores? F1 on the rows that the thresholds were searched on "
                  "flatters.", {"threshold": ".2f"}),
            *member_blocks(found.get("members")), *paper_blocks(work)]


def per_class_figure(table: pd.DataFrame) -> Figure:
    table = table.sort_values("F1, cross-fitted", ascending=False, kind="stable")
    intervals = np.array(table["95 % interval"].to_list()) if "95 % interval" in table else None
    return Figure("F1 of each class", plots.dots(
        "f1", [f"{name} ({n:,})" for name, n in zip(table["class"], table["positives"], strict=True)],
        {"own rows, flattering": table["F1, own rows"].to_numpy(), "cross-fitted": table["F1, cross-fitted"].to_numpy()}, "F1",
        intervals=intervals, xlim=(-0.02, 1.02)), "Positives in brackets. Filled marks are honest"
        + (", with 95 % intervals" if intervals is not None else "") + "; a hollow mark far to the right is a threshold "
        "fitted to chance. Work on the classes at the bottom: they pull macro F1 down most.")


def member_blocks(members: list[dict] | None) -> list:
    """Show what each member of the ensemble scores, where stage 06 says so."""
    if not members:
        return []
    names = {"name": "member", "score_cross_fitted": "macro F1, cross-fitted", "interval": "95 % interval",
             "leave_one_out": "ensemble without it"}
    table = pd.DataFrame(members)
    plain = [name for name in table if not isinstance(table[name].iloc[0], (dict, list)) or name == "interval"]
    return [Table("Members of the ensemble", table[plain].rename(columns=lambda name: names.get(name, name.replace("_", " "))),
                  "A member is worth its place if the ensemble is worse without it.")]


def paper_blocks(work: Work) -> list:
    """Show the paper's tables, where stage 09 has made them."""
    from common.tables import HEADINGS, TITLES
    from common.artifacts import read_table

    folder, blocks = work.folder / "tables", []
    if not (folder / "gains.csv").is_file():
        return [Note(f"The paper's tables have not been made; run: bash run_tables.sh --work {work.folder}")]
    gains = read_table(folder / "gains.csv", "")
    if len(gains):
        labels = [f"{gain.model}: {TITLES[gain.column]}" for gain in gains.itertuples()]
        blocks.append(Figure("What each part of the method gives", plots.dots(
            "gains", labels, {"paper": pd.to_numeric(gains["paper"]).to_numpy(), "here": gains["gain"].to_numpy()}, "gain in macro F1",
            intervals=gains[["low", "high"]].to_numpy(), reference=0),
            "Each row against the step before it, with its 95 % interval. An interval that crosses 0 shows no gain."))
    for table, title in HEADINGS.items():
        wide = read_table(folder / f"table{table}.csv", "").replace("", np.nan)
        titles = {name: f"{TITLES[name.removesuffix('_paper')]}{', paper' if name.endswith('_paper') else ''}" for name in wide.columns[2:]}
        wide[list(titles)] = wide[list(titles)].astype(float)
        blocks.append(Table(f"The paper's Table {table}: {title}", wide.rename(columns=titles), "Macro F1 on the validation fold. The "
                            "paper's figures are from its own split: compare gains, not levels."))
    return blocks


# --- errors ------------------------------------------------------------------------------------------------

def errors(work: Work) -> list:
    rows, targets, probs = work.oof
    margin = log_odds(probs) - log_odds(work.cuts)  # above 0: predicted
    predicted = margin >= 0
    wrong = {"Most confident misses": (targets & ~predicted, -margin, "Labelled with the class in bold, and predicted far below its "
                                       "threshold. If the green is not there, the label may be wrong."),
             "Most confident false alarms": (~targets & predicted, margin, "Predicted with the class in bold, and not labelled with "
                                             "it. If the green is there, a label may be missing.")}
    blocks = [Facts({"samples all right": f"{100 * (targets == predicted).all(axis=1).mean():.0f} %",
                     "missed labels": f"{(targets & ~predicted).sum():,} of {targets.sum():,}",
                     "false alarms": f"{(~targets & predicted).sum():,}"})]
    for title, (mask, confidence, text) in wrong.items():
        cards = [error_card(work, rows["Id"][row], c, targets[row], predicted[row], probs[row])
                 for row, c in worst(mask, confidence)]
        blocks += [Gallery(title, cards, text)] if cards else []
    return [*blocks, error_table(targets, predicted), mistaken_for(targets, predicted), *suspects(work, rows, targets, probs, predicted)]


def log_odds(probs) -> np.ndarray:
    probs = np.clip(probs, 1e-6, 1 - 1e-6)
    return np.log(probs / (1 - probs))


def worst(mask, confidence, each: int = 2) -> list[tuple[int, int]]:
    """Return the (row, class) of the most confident of `mask`: at most two of a class, one of a sample."""
    found, classes = {}, []
    cells = np.argwhere(mask)
    for row, c in cells[np.argsort(-confidence[mask], kind="stable")]:
        if row not in found and classes.count(c) < each:
            found[int(row)] = int(c)
            classes.append(c)
        if len(found) == SHOWN:
            break
    return list(found.items())


def error_card(work: Work, Id: str, c: int, target, predicted, prob):
    return work.card([Id], [f"{NAMES[c]}: {prob[c]:.2f} (threshold {work.cuts[c]:.2f})", f"labelled {', '.join(NAMES[target])}",
                            f"predicted {', '.join(NAMES[predicted]) or 'none'}"])


def error_table(targets, predicted) -> Table:
    missed, false = (targets & ~predicted).sum(axis=0), (~targets & predicted).sum(axis=0)
    table = pd.DataFrame({"class": NAMES, "positives": targets.sum(axis=0), "missed": missed, "false alarms": false})
    return Table("Errors of each class", table.sort_values("missed", ascending=False, kind="stable"), "Many misses and few false alarms: "
                 "the threshold is high, or the class is too faint. The other way round, something else looks like it.")


def mistaken_for(targets, predicted) -> Table:
    """Count which class is predicted falsely where another one is missed."""
    counts = (targets & ~predicted).astype(float).T @ (~targets & predicted).astype(float)
    first, second = np.nonzero(counts)
    table = pd.DataFrame({"missed": NAMES[first], "falsely predicted": NAMES[second], "samples": counts[first, second].astype(int)})
    return Table("What is predicted in place of what", table.sort_values("samples", ascending=False, kind="stable").head(40),
                 "The pairs at the top are those that the networks cannot tell apart, or that follow the common classes.")


def suspects(work: Work, rows, targets, probs, predicted) -> list:
    """Show the samples whose labels may be wrong: kept by the hard samplers, with a high loss in and out of training."""
    tables = [table.assign(run=f"{recipe} {fold}") for recipe in there(lambda: work.runs) or {}
              for fold, table in work.run_tables(recipe, "hard_samples.csv").items()]
    clipped = np.clip(probs, 1e-6, 1 - 1e-6)
    table = pd.DataFrame({"Id": rows["Id"], "labels": [", ".join(NAMES[row]) for row in targets],
                          "predicted": [", ".join(NAMES[row]) or "none" for row in predicted],
                          "loss out of fold": -np.where(targets, np.log(clipped), np.log(1 - clipped)).sum(axis=1)})
    # More labels, more loss: a sample is ranked among those with as many.
    table["suspicion"] = table["loss out of fold"].groupby(np.minimum(targets.sum(axis=1), 3)).rank(pct=True)
    text = "Suspicion is the rank, from 0 to 1, of the loss out of fold among samples with as many labels. "
    if tables:
        hard = pd.concat(tables)
        n_labels = hard["Target"].str.split().str.len().clip(upper=3)
        hard["rank"] = hard.groupby(["run", n_labels])["mean_loss"].rank(pct=True)
        hard = hard.groupby("Id").agg(**{"kept by the sampler": ("share_kept", "mean"), "rank in training": ("rank", "mean")})
        table = table.join(hard, on="Id")
        table["suspicion"] = (table["suspicion"] + table["rank in training"].fillna(0)) / 2
        text = ("Suspicion is the mean of two ranks from 0 to 1, each among samples with as many labels: of the loss out of fold, and of "
                "the mean loss in the trainings that had the sample. Near 1, the networks cannot even learn it by heart. ")
    table = table.sort_values(["suspicion", "Id"], ascending=[False, True], ignore_index=True)
    cards = [work.card([row.Id], [f"labelled {row.labels}", f"predicted {row.predicted}"]) for row in table.head(SHOWN).itertuples()]
    return [Gallery("Suspects for wrong labels", cards, text + "Look whether the label is there to be seen."),
            Table("The 100 first suspects", table.head(100), "For a person to look at; nothing is changed by itself.", wide=True)]


# --- submission --------------------------------------------------------------------------------------------

def submission(work: Work) -> list:
    table = work.submission
    predicted = parse_targets(table["Predicted"])
    labelled = work.samples[work.samples["part"] == "train"]
    known = parse_targets(labelled["Target"])
    ours, theirs = 100 * predicted.mean(axis=0), 100 * known.mean(axis=0)
    order = np.argsort(-theirs, kind="stable")
    counts = pd.DataFrame({"class": NAMES, "test samples": predicted.sum(axis=0), "of test, %": ours, "of training, %": theirs,
                           "ratio": np.divide(ours, theirs, out=np.full(N_CLASSES, np.nan), where=theirs > 0)}).iloc[order]
    return [
        Facts({"rows": f"{len(table):,}", "labels a row": f"{predicted.sum(axis=1).mean():.2f}",
               "in training": f"{known.sum(axis=1).mean():.2f}", "empty rows": f"{(~predicted.any(axis=1)).sum():,}",
               "classes never predicted": ", ".join(NAMES[~predicted.any(axis=0)]) or "none"}),
        Figure("Class frequencies", plots.dots("submission", list(NAMES[order]), {
            "training": np.where(theirs > 0, theirs, np.nan)[order], "submission": np.where(ours > 0, ours, np.nan)[order]},
            "share of the samples, %", log=True),
            "The two marks of a class should be close, unless test differs from training. Far to the right the class is "
            "predicted too freely; no filled mark means never."),
        Table("Class frequencies", counts, "Sort by ratio: far from 1, look at the class's threshold.",
              {"of test, %": ".2f", "of training, %": ".2f", "ratio": ".2f"})]
