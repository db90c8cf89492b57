"""Sections of the page on inputs: data, duplicates, folds, trainings."""

from typing import Any

import numpy as np
import pandas as pd

from common.classes import N_CLASSES
from common.data.class_weights import effective_number_weights
from common.data.exposure import exposure_warning
from common.data.folds import HOLD_OUT, TRAIN_ONLY, class_counts, fold_numbers
from common.data.images import CHANNELS
from common.data.labels import parse_targets
from common.report import plots
from common.report.page import Card, Facts, Figure, Gallery, Heading, Note, Table, section
from common.report.reader import NAMES, SHOWN, Work, class_names, speed_and_memory, there
from common.train.schedules import suggest_learning_rate

STAINS = dict(zip(CHANNELS, ("microtubules", "the protein", "nucleus", "reticulum"), strict=True))


# --- data --------------------------------------------------------------------------------------------------


@section("Data", "The images and labels to train on. Counts are of samples; a sample may have several classes.")
def data(work: Work) -> list:
    samples = work.samples
    parts = [part for part in ("train", "test", "external") if (samples["part"] == part).any()]
    labelled = samples[samples["part"] != "test"]
    targets = parse_targets(labelled["Target"])
    order = np.argsort(-targets.sum(axis=0), kind="stable")
    facts = {f"{part} samples": f"{(samples['part'] == part).sum():,}" for part in parts}
    facts |= {
        "classes with samples": f"{targets.any(axis=0).sum()} of {N_CLASSES}",
        "labels per sample": f"{targets.sum(axis=1).mean():.2f}",
        "stored at": f"{', '.join(work.stores)} px",
    }
    return [
        Facts(facts),
        *exposure(work),
        *left_out(work),
        *class_blocks(count_stages(work), order),
        labels_figure(targets),
        *image_blocks(work, parts),
        *co_occurrence(targets, order),
        contact_sheet(work, targets, labelled["Id"].to_numpy()),
    ]


def exposure(work: Work) -> list[Note]:
    """Repeat stage 01's warnings, for example of images that hardly use their range of brightness."""
    warning = exposure_warning(work.folder)
    return [Note(warning[0].upper() + warning[1:] + ".")] if warning else []


def left_out(work: Work) -> list[Table]:
    """Show which samples stage 01 left out, and why."""
    if work.left_out.empty:
        return []
    return [
        Table(
            f"Samples left out: {len(work.left_out):,}",
            work.left_out.head(100),
            "Stage 01 could not use them, so nothing "
            "below counts them. Test samples among them have empty rows in the submission.",
            wide=True,
        )
    ]


def count_stages(work: Work) -> dict[str, np.ndarray]:
    """Return the samples of each class, (28,): labelled, after stage 02, and in training with stage 03's copies."""
    labelled = work.samples[work.samples["part"] != "test"]
    counts = {"labelled": parse_targets(labelled["Target"]).sum(axis=0)}
    duplicates, folds = there(lambda: work.duplicates), there(lambda: work.folds)
    if duplicates is not None:
        counts["without duplicates"] = parse_targets(duplicates.loc[duplicates["kept"] == 1, "Target"]).sum(axis=0)
    if folds is not None:
        used = folds[folds["fold"] != HOLD_OUT]
        counts["with copies"] = used["copies"].to_numpy() @ parse_targets(used["Target"])
    return counts


def class_blocks(counts: dict[str, np.ndarray], order: np.ndarray) -> list:
    """Show the samples of each class as a figure and as a table."""
    marks = {name: np.where(values > 0, values, np.nan)[order] for name, values in counts.items()}
    return [
        Figure(
            "Samples of each class",
            plots.dots("classes", list(NAMES[order]), marks, "samples", log=True),
            "Look for classes at the far left, or without a mark: they decide macro F1, and their scores are "
            "uncertain. Copies: how often a sample appears in an epoch of training.",
        ),
        Table(
            "Samples of each class",
            pd.DataFrame({"class": NAMES, **counts}).iloc[order],
            "Sort by a column to find the rarest class, or the one that lost most.",
        ),
    ]


def labels_figure(targets: np.ndarray) -> Figure:
    counts = np.bincount(targets.sum(axis=1))[1:]
    return Figure(
        "Labels per sample",
        plots.bars("labels", [str(n + 1) for n in range(len(counts))], counts, "labels of a sample", "samples"),
        "Most samples should have one to three. A network that predicts many more or fewer has wrong thresholds.",
    )


def image_blocks(work: Work, parts: list[str]) -> list:
    """Show the brightness of the channels by part, and the sizes of the sources."""
    images = next(reversed(work.stores.values()))
    part_of = work.samples.set_index("Id")["part"].reindex(images["Id"]).to_numpy()
    means = {part: [images[f"mean_{channel}"][part_of == part].to_numpy() for channel in CHANNELS] for part in parts}
    titles = [f"{channel}\n{stain}" for channel, stain in STAINS.items()]
    channels = pd.DataFrame(
        [
            {
                "channel": f"{channel} ({stain})",
                "mean": images[f"mean_{channel}"].mean(),
                "spread within an image": images[f"std_{channel}"].mean(),
                "black, %": 100 * images[f"zeros_{channel}"].mean(),
                "saturated, %": 100 * images[f"saturated_{channel}"].mean(),
            }
            for channel, stain in STAINS.items()
        ]
    )
    sizes = pd.crosstab(work.samples["side"], work.samples["part"])[parts].reset_index()
    return [
        Figure(
            "Brightness of the channels",
            plots.boxes("channels", titles, means, "mean of an image, 0 to 1"),
            "Boxes span the middle half of the images, whiskers 90 %. Look for parts that differ: there a network "
            "sees images unlike those that it was trained on.",
        ),
        Table(
            "Size of the source images",
            sizes.rename(columns={"side": "side, px"}),
            "Samples by the side of their source; larger ones are shrunk to the recipes' sizes.",
            {"side, px": "d"},
        ),
        Table(
            "Channels",
            channels,
            "Means over the stored images, 0 to 1. Much black or saturation means a lost signal.",
            {"saturated, %": ".2f", "black, %": ".1f"},
        ),
    ]


def co_occurrence(targets: np.ndarray, order: np.ndarray) -> list:
    """Show which classes occur together, as shares and as the most frequent pairs."""
    together = targets.astype(int).T @ targets.astype(int)
    counts = np.diag(together)
    shown = order[counts[order] > 0]
    share = together[np.ix_(shown, shown)] / counts[shown, None]
    np.fill_diagonal(share, np.nan)
    first, second = np.triu_indices(N_CLASSES, 1)
    pairs = pd.DataFrame(
        {
            "class": NAMES[first],
            "and": NAMES[second],
            "together": together[first, second],
            "by chance": counts[first] * counts[second] / len(targets),
        }
    )
    pairs = pairs[pairs["together"] > 0].sort_values("together", ascending=False, kind="stable").head(40)
    return [
        Figure(
            "Classes that occur together",
            plots.matrix(
                "together", share, list(NAMES[shown]), "share of the row's samples that also have the column's class"
            ),
            "Bright cells are pairs to expect. A network may detect a rare class in a bright cell by its companion.",
            wide=True,
        ),
        Table(
            "Most frequent pairs of classes",
            pairs.assign(ratio=pairs["together"] / pairs["by chance"]),
            "By chance: as often as if labels were independent. A ratio far above 1 marks companions, unless "
            "it is based on few samples.",
            {"by chance": ".1f", "ratio": ".2f"},
            wide=True,
        ),
    ]


def contact_sheet(work: Work, targets: np.ndarray, ids: np.ndarray) -> Gallery:
    """Show a sample of each class, one with few other labels; rare classes choose first."""
    chosen: dict[int, np.integer] = {}
    for c in np.argsort(targets.sum(axis=0), kind="stable"):
        rows = [row for row in np.flatnonzero(targets[:, c]) if row not in chosen.values()]
        if rows:
            chosen[c] = min(rows, key=lambda row: targets[row].sum())
    cards = []
    for c, row in chosen.items():
        others = ", ".join(NAMES[other] for other in np.flatnonzero(targets[row]) if other != c)
        cards.append(work.card([ids[row]], [NAMES[c], f"with {others}" if others else "alone"]))
    return Gallery(
        "A sample of each class",
        cards,
        "Look for the green, the protein: its place is the class. Microtubules "
        "are red, the nucleus is blue, the endoplasmic reticulum yellow.",
    )


# --- duplicates --------------------------------------------------------------------------------------------


@section(
    "Duplicates",
    "Near-identical images by perceptual hashes of red, green and blue. Per group, one sample of each set of labels "
    "stays for training; nothing is removed from test.",
)
def duplicates(work: Work) -> list:
    table, pairs = work.duplicates, work.pairs
    groups = table.groupby("near_group").agg(
        samples=("Id", "size"),
        kept=("kept", "sum"),
        labels=("Target", lambda targets: " | ".join(sorted(set(map(class_names, targets))))),
    )
    groups = groups[groups["samples"] > 1].sort_values("samples", ascending=False, kind="stable")
    apart = pairs[(pairs["part"] == "test") ^ (pairs["other_part"] == "test")]
    facts = Facts(
        {
            "groups": f"{len(groups):,}",
            "left out of training": f"{(table['kept'] == 0).sum():,}",
            "near-identical pairs": f"{len(pairs):,}",
            "pairs of test and labelled samples": f"{len(apart):,}",
        }
    )
    if pairs.empty:
        return [facts, Note("No two samples are near-identical.")]
    return [
        facts,
        closeness(np.bincount(pairs["bits"].astype(int))),
        Table(
            "Groups",
            groups.reset_index().rename(columns={"near_group": "first sample"}).head(200),
            "The largest first. Labels that differ within a group are separated by a bar.",
        ),
        *pair_galleries(work, pairs, apart),
    ]


def closeness(counts: np.ndarray) -> Figure:
    """Show how many pairs have each distance in bits."""
    names, label = [str(n) for n in range(len(counts))], "largest distance of the three channels, bits of 64"
    return Figure(
        "How close the pairs are",
        plots.bars("bits", names, counts, label, "pairs"),
        "Look for a gap before the right end. Without one the limit may be too wide; duplicate_pairs.png shows the "
        "closest pairs that do not count.",
    )


def pair_galleries(work: Work, pairs: pd.DataFrame, apart: pd.DataFrame, most: int = SHOWN // 2) -> list[Gallery]:
    """Show pairs of four kinds, if there are any."""
    kinds = (
        ("Closest pairs", pairs, "They should be the same picture."),
        ("Farthest pairs that count", pairs[most:][::-1], "If these show different cells, lower the threshold."),
        (
            "Pairs whose labels differ",
            pairs[pairs["agreement"] < 1].sort_values("agreement", kind="stable"),
            "The same picture with other labels: at least one of them may be wrong.",
        ),
        (
            "Matches between test and labelled samples",
            apart,
            "For these test samples the label is known; a score on them is too good.",
        ),
    )
    return [
        Gallery(title, [pair_card(work, pair) for pair in some.head(most).itertuples()], text)
        for title, some, text in kinds
        if len(some)
    ]


def pair_card(work: Work, pair: Any) -> Card:
    """Show two images with their labels and distances."""
    first, second = (
        class_names(target) if part != "test" else "test"
        for target, part in ((pair.Target, pair.part), (pair.other_Target, pair.other_part))
    )
    return work.card(
        [pair.Id, pair.other_Id],
        [
            first if first == second else f"{first} | {second}",
            f"bits apart: red {pair.red}, green {pair.green}, blue {pair.blue}",
        ],
    )


# --- folds -------------------------------------------------------------------------------------------------


@section("Folds", "How the samples are split for validation: whole groups of duplicates, every class evenly.")
def folds(work: Work) -> list:
    table = work.folds
    numbers, targets, fold = fold_numbers(table), parse_targets(table["Target"]), table["fold"].to_numpy()
    positives = {f"fold {k}": targets[fold == k].sum(axis=0) for k in numbers}
    even = np.mean(list(positives.values()), axis=0)
    away = {name: counts - even for name, counts in positives.items()}
    order = np.argsort(-even, kind="stable")
    aside = {
        name: fold == place
        for name, place in (("for training only", TRAIN_ONLY), ("held out", HOLD_OUT))
        if (fold == place).any()
    }
    counts = {
        "class": NAMES,
        **positives,
        **{name: targets[rows].sum(axis=0) for name, rows in aside.items()},
        "off an even share": np.abs(list(away.values())).max(axis=0),
    }
    missing = NAMES[(np.min(list(positives.values()), axis=0) == 0) & (even > 0)]
    return [
        Facts(
            {
                "samples per fold": ", ".join(f"{(fold == k).sum():,}" for k in numbers),
                **{name: f"{rows.sum():,}" for name, rows in aside.items()},
                "groups split": str((table.groupby("group")["fold"].nunique() > 1).sum()),
                "copies of a sample": f"1 to {table['copies'].max()}",
            }
        ),
        *too_rare(missing),
        evenness(list(NAMES[order]), {name: values[order] for name, values in away.items()}),
        Table(
            "Positives of each class",
            pd.DataFrame(counts).iloc[order],
            "Samples that have the class.",
            {"off an even share": ".1f"},
        ),
    ]


def too_rare(names: np.ndarray) -> list[Note]:
    """Name the classes without a positive in some fold."""
    text = f"Too rare for a positive in every fold: {', '.join(names)}. Their scores depend on few samples."
    return [Note(text)] if len(names) else []


def evenness(names: list[str], away: dict[str, np.ndarray]) -> Figure:
    """Show how far each fold's positives of a class, fold -> (n_classes,), are from an even share."""
    return Figure(
        "How even the folds are",
        plots.dots("folds", names, away, "positives more than an even share", reference=0, filled=False),
        "Every mark should be within a few samples of 0; a class far off is validated on too few or too many.",
    )


# --- training ----------------------------------------------------------------------------------------------


@section("Training", "Each recipe's trainings, one per fold. Validation images are those of the fold.")
def training(work: Work) -> list:
    blocks: list = [
        Table(
            "Trainings",
            run_table(work),
            "Training ends by the recipe's own rule; 8+4 epochs: it ended after 8 and then got more cycles. "
            "The best epoch is the one with the highest macro F1 at a threshold of 0.5 on the fold's validation images, "
            "so it is a little too good.",
            {"seconds per epoch": ",.1f", "minutes": ",.1f", "images/s": ",.1f", "memory, MiB": ",.0f"},
            wide=True,
        )
    ]
    for recipe, logs in work.runs.items():
        starts = dict.fromkeys(log["start"].iloc[0] for log in logs.values() if "start" in log)
        blocks += [
            Heading(recipe),
            *[Note(f"Started {start}.") for start in starts],
            *curves(recipe, logs),
            *finder(work, recipe),
            *hard_mix(work, recipe),
            *class_weights(work, recipe),
        ]
    return blocks


def run_table(work: Work) -> pd.DataFrame:
    """Return a row per recipe and fold: its progress, best epoch and time."""
    rows = []
    for recipe, logs in work.runs.items():
        for fold, log in logs.items():
            measured = speed_and_memory([log])
            log = log.reindex(columns=["epoch", "seconds", "valid_seconds", "macro_f1"])
            seconds = epoch_seconds(log)
            best = log.nlargest(1, "macro_f1")
            rows.append(
                {
                    "recipe": recipe,
                    "fold": fold,
                    "epochs": work.run_epochs(recipe, fold),
                    "state": "finished" if work.run_record(recipe, fold) else "unfinished",
                    "best macro F1": best["macro_f1"].max(),
                    "in epoch": best["epoch"].max(),
                    "seconds per epoch": seconds.mean(),
                    "minutes": seconds.sum() / 60,
                    **measured,
                }
            )
    return pd.DataFrame(rows)


def epoch_seconds(log: pd.DataFrame) -> pd.Series:
    """Return the seconds of each epoch of a training, its validation included."""
    return log.reindex(columns=["seconds", "valid_seconds"]).fillna(0).sum(axis=1)


def curves(recipe: str, logs: dict[int, pd.DataFrame]) -> list[Figure]:
    """Show loss, macro F1 and learning rate over the epochs."""
    loss, score, dashed = {}, {}, []
    for k, (fold, log) in enumerate(logs.items()):
        dashed.append(f"fold {fold} in training")
        loss[dashed[-1]] = (log["epoch"], log["train_loss"], k)
        seen = log.reindex(columns=["epoch", "valid_loss", "macro_f1"]).dropna().astype({"epoch": int})
        loss[f"fold {fold}"], score[f"fold {fold}"] = (
            (seen["epoch"], seen[name], k) for name in ("valid_loss", "macro_f1")
        )
    longest = max(logs.values(), key=len)
    rate = {"at the end of the epoch": (longest["epoch"], longest["learning_rate"])}
    restarts = {"verticals": longest["epoch"][longest["cycle"].diff() > 0] - 0.5}
    return [
        Figure(
            "Loss",
            plots.lines(f"loss {recipe}", loss, "epoch", "loss per sample", dashed=dashed, **restarts),
            "Both should fall. A validation loss (solid) that rises while the training loss (dashed) falls means "
            "overfitting. Dotted lines are restarts. Training counts crops and the hardest samples only, so the two "
            "are not comparable.",
        ),
        Figure(
            "Macro F1",
            plots.lines(f"score {recipe}", score, "epoch", "macro F1 at 0.5", ylim=(0, None), **restarts),
            "Scores should end near their highest point. A drop after a restart (dotted) is normal, and should "
            "be recovered within the cycle.",
        ),
        Figure(
            "Learning rate",
            plots.lines(f"rate {recipe}", rate, "epoch", "learning rate of the head", ylim=(0, None), **restarts),
            "The schedule as trained. Cycles follow a cosine down, and return to the top at each restart (dotted).",
        ),
    ]


def finder(work: Work, recipe: str) -> list[Figure]:
    """Show the curves of the learning rate finder, with the lowest point of the first and the rate that was used."""
    tables = {fold: table.dropna() for fold, table in work.run_tables(recipe, "lr_find.csv").items()}
    if not tables:
        return []
    series = {f"fold {fold}": (table["learning_rate"], table["smoothed"]) for fold, table in tables.items()}
    fold, table = next(iter(tables.items()))
    best = suggest_learning_rate(list(table["learning_rate"]), list(table["loss"]))
    lowest = (best, table["smoothed"][(table["learning_rate"] - best).abs().idxmin()])
    used = work.run_record(recipe, fold).get("learning_rates", [])[-1:]
    top = 1.15 * max(table["smoothed"].iloc[0] for table in tables.values())
    svg = plots.lines(
        f"finder {recipe}",
        series,
        "learning rate, growing with each batch",
        "loss, smoothed",
        logx=True,
        verticals=used,
        marks={f"lowest, fold {fold}: {best:.2g}": lowest},
        ylim=(0, top),
    )
    return [
        Figure(
            "Learning rate finder",
            svg,
            "The mark is the highest rate at which the loss still falls: an upper limit. "
            + (f"The dotted line is the rate used, {used[0]:.2g}; it should be left of the mark." if used else ""),
        )
    ]


def hard_mix(work: Work, recipe: str) -> list[Figure]:
    """Show which classes the hard sampler keeps more often than it sees."""
    tables = work.run_tables(recipe, "hard_classes.csv").values()
    if not tables:
        return []
    sums = pd.concat(tables).groupby("class")[["ranked", "kept"]].sum().reindex(NAMES)
    sums = sums[sums["ranked"] > 0]
    shares = 100 * sums / sums.sum()
    shares = shares.iloc[np.argsort(-shares["kept"] / shares["ranked"], kind="stable")]
    marks = {"share seen": shares["ranked"], "share kept": shares["kept"].where(shares["kept"] > 0)}
    return [
        Figure(
            "What the hard sampler trains on",
            plots.dots(f"hard {recipe}", list(shares.index), marks, "share of all labels, %", log=True),
            "All folds and epochs together; the class that gains most is at the top. Filled marks right of the hollow "
            "ones are classes that are trained on more than they are seen; far to the right, labels may be wrong.",
        )
    ]


def class_weights(work: Work, recipe: str) -> list[Figure]:
    """Show the weights of the E-loss in the first finished fold."""
    finished = {fold: work.run_record(recipe, fold) for fold in work.runs[recipe]}
    fold = next((fold for fold, record in finished.items() if record), None)
    if fold is None:
        return []
    settings = there(lambda: work.run_recipe(recipe, fold))
    if settings is None or settings.class_weights == "none":
        return []
    counts = class_counts(work.folds, fold)
    weights = effective_number_weights(counts, settings.alpha, settings.class_weights)
    order = np.argsort(-weights, kind="stable")
    names = [f"{NAMES[c]} ({counts[c]:,})" for c in order]
    return [
        Figure(
            "E-loss weights",
            plots.dots(
                f"weights {recipe}", names, {"weight": weights[order]}, "weight of the class in the loss", log=True
            ),
            f"Fold {fold}, alpha {settings.alpha:g}; training samples in brackets. Rare classes weigh more, and more "
            "so with a higher alpha. If all are equal, alpha is too low to matter.",
        )
    ]
