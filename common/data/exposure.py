"""How source files use their range of values: judged in stage 01, kept in its sidecar, repeated by later stages."""

from pathlib import Path

import numpy as np

from common.artifacts.layout import Layout
from common.artifacts.stage import read_sidecar, sidecar
from common.data.options import WHOLE, Levels

SAMPLED = 512  # pixels per side that are read of larger images
OUTLIERS = 0.001  # share of the pixels at either end that is ignored: hot and dead ones
FILES_THAT_COUNT = 0.5  # a part is warned of if this share of its files is affected
PART_OF_RANGE = 0.25  # a file should use at least this much of the range, and begin within it
MAY_BE_CUT_OFF = 0.1  # share of the files that suggested levels may cut off
FAINT = 0.25  # of the brightest plane's mean, which each plane of the channel should reach
BLACK_MEAN = 0.5 / 255  # of the range: a colour image below this has no signal anywhere
COLOURS = ("red", "green", "blue")  # the planes of a colour image
NAMED = 5  # files in a warning


def used_range(plane: np.ndarray) -> list[int]:
    """Return the range of a 16-bit plane's pixels, except a thousandth at either end."""
    step = max(1, len(plane) // SAMPLED)
    values = np.sort(plane[::step, ::step], axis=None)
    left_out = int(OUTLIERS * len(values))
    return [int(values[left_out]), int(values[-1 - left_out])]


def signal_elsewhere(image: np.ndarray, own: tuple[int, ...]) -> str | None:
    """Name the planes with nearly all signal of a colour image, (side, side, 3), if not its channel's, `own`."""
    step = max(1, len(image) // SAMPLED)
    means = image[::step, ::step].reshape(-1, 3).mean(axis=0) / np.iinfo(image.dtype).max
    if means.max() < BLACK_MEAN or min(means[plane] for plane in own) >= FAINT * means.max():
        return None
    bright = [name for name, mean in zip(COLOURS, means, strict=True) if mean >= FAINT * means.max()]
    return f"{' and '.join(bright)} plane{'s' * (len(bright) > 1)}"


def judge(parts: list[str], seen: list[dict], levels: Levels) -> dict:
    """Return what is wrong with the exposure of samples, JSON-able, for `describe`.

    parts : train, test or external, of each sample
    seen : for each sample, its 16-bit files' `ranges` (see `used_range`) and `misplaced` files: name -> other planes
    """
    used: dict[str, list] = {}
    for part, sample in zip(parts, seen, strict=True):
        used.setdefault(part, []).extend(sample["ranges"])
    ranges = {part: np.array(values) for part, values in used.items() if values}
    problems = [
        {"part": part, **problem} for part, values in ranges.items() if (problem := judge_ranges(values, levels))
    ]
    misplaced = {name: place for sample in seen for name, place in sample["misplaced"].items()}
    return {
        "levels": list(levels),
        "problems": problems,
        "all_parts": len(problems) == len(ranges),
        "misplaced": len(misplaced),
        "such_as": dict(list(misplaced.items())[:NAMED]),
    }


def judge_ranges(ranges: np.ndarray, levels: Levels) -> dict | None:
    """Return how many files are cut off at white, or use a small part of the range between black and white.

    Also returns the values that these files use, and how many use more. None if less than half are affected.

    ranges : (n, 2), the lowest and highest value of each file
    """
    black, white = levels
    low, high = np.minimum(ranges, white).T
    part = PART_OF_RANGE * (white - black)
    for kind, which in (
        ("cut off", ranges[:, 1] > white),
        ("narrow", (high - low.clip(black) < part) | (low - black > part)),
    ):
        if which.mean() >= FILES_THAT_COUNT:
            used = Levels(
                int(np.percentile(ranges[which, 0], 5, method="lower")),
                int(np.percentile(ranges[which, 1], 95, method="higher")),
            )
            return {
                "kind": kind,
                "files": int(which.sum()),
                "of": len(ranges),
                "low": used.black,
                "high": used.white,
                "above": int((ranges[:, 1] > fitting(*used).white).sum()),
            }
    return None


def fitting(low: int, high: int) -> Levels:
    """Return levels for files with these values; without an offset, white is 2 ** bits - 1."""
    if low <= PART_OF_RANGE * (high - low):
        return Levels(0, max(1, 2 ** high.bit_length() - 1))
    black = min(low, WHOLE.white - 1)
    return Levels(black, max(high, black + 1))


def describe(found: dict, who: str = "stage 01 or run_all.sh") -> list[str]:
    """Return a warning for each problem that `judge` found, with the cure; who : takes the flags for levels."""
    kinds = [[problem for problem in found["problems"] if problem["kind"] == kind] for kind in ("cut off", "narrow")]
    lines = [describe_ranges(problems, found["levels"], found["all_parts"], who) for problems in kinds if problems]
    if found["misplaced"]:
        names = "; ".join(f"in {name} nearly all signal is in the {place}" for name, place in found["such_as"].items())
        more = found["misplaced"] - len(found["such_as"])
        lines.append(
            f"{found['misplaced']} colour images are nearly black in the plane of their own channel: {names}"
            f"{f'; and {more} more' if more else ''}. Write their planes in the order red, green, blue (OpenCV's is "
            "blue, green, red)"
        )
    return lines


def describe_ranges(problems: list[dict], levels: list[int], all_parts: bool, who: str) -> str:
    """Return the warning about problems of one kind (see `judge_ranges`), one for each part."""
    low, high = min(problem["low"] for problem in problems), max(problem["high"] for problem in problems)
    files, of, above = (sum(problem[key] for problem in problems) for key in ("files", "of", "above"))
    parts = "" if all_parts else f" {' and '.join(problem['part'] for problem in problems)}"
    what = (
        f"use {low}..{high} of {levels[0]}..{levels[1]} only"
        if problems[0]["kind"] == "narrow"
        else f"reach {high} and are cut off at --white-level {levels[1]}"
    )
    black, white = fitting(low, high)
    cure = (
        f"{above} files use more, so no level fits all; save them all with the same range"
        if above > MAY_BE_CUT_OFF * of
        else f"give {who} {f'--black-level {black} ' if black else ''}--white-level {white}"
    )
    return f"the 16-bit{parts} files {what} ({files} of {of} files), so images have few grey levels; {cure}"


def exposure_warning(work: Path) -> str | None:
    """Return stage 01's warnings about a work folder's images in one line; None if there were none."""
    path = Layout(work).samples
    found = read_sidecar(path).get("exposure") if sidecar(path).is_file() else None
    lines = describe(found) if found else []
    return f"warning: {'. '.join(lines)}" if lines else None
