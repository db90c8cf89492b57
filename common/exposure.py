"""How source files use the range of their values: judged in stage 01, kept in its sidecar, repeated by later stages."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.artifacts import read_sidecar, sidecar

SAMPLED = 512  # pixels a side that are looked at, of larger images
OUTLIERS = 0.1  # percent of the pixels at either end that do not count: hot and dead ones
FILES_THAT_COUNT = 0.5  # share of a part's files from which on the part is warned of
PART_OF_RANGE = 0.25  # of the range, which a file should use at least, and begin within
FAINT = 0.25  # of the brightest plane's mean, which each plane of the channel should reach
BLACK_MEAN = 0.5 / 255  # of the range: a colour image below this has no signal anywhere
COLOURS = ("red", "green", "blue")  # the planes of a colour image
NAMED = 5  # files in a warning


class Levels(NamedTuple):
    """The 16-bit values that become 0 and 255."""
    black: int = 0
    white: int = 65535


WHOLE = Levels()


def used_range(plane: np.ndarray) -> list[int]:
    """Return the values between which a 16-bit plane's pixels lie, but for a thousandth at either end."""
    step = max(1, len(plane) // SAMPLED)
    seen = plane[::step, ::step]
    return [int(np.percentile(seen, OUTLIERS, method="lower")), int(np.percentile(seen, 100 - OUTLIERS, method="higher"))]


def signal_elsewhere(image: np.ndarray, own: tuple[int, ...]) -> str | None:
    """Name the planes that hold nearly all signal of a colour image, (side, side, 3), where those of its channel, `own`, do not."""
    step = max(1, len(image) // SAMPLED)
    means = image[::step, ::step].reshape(-1, 3).mean(axis=0) / np.iinfo(image.dtype).max
    if means.max() < BLACK_MEAN or min(means[plane] for plane in own) >= FAINT * means.max():
        return None
    bright = [name for name, mean in zip(COLOURS, means, strict=True) if mean >= FAINT * means.max()]
    return f"{' and '.join(bright)} plane{'s' * (len(bright) > 1)}"


def judge(parts: list[str], seen: list[dict], levels: Levels) -> dict:
    """Return what is to be said of the exposure of samples, JSON-able, for `describe`.

    parts : train, test or external, of each sample
    seen : of each sample its 16-bit files' `ranges` (see `used_range`) and its `misplaced` files: name -> other planes
    """
    problems = []
    for part in dict.fromkeys(parts):
        ranges = [values for p, sample in zip(parts, seen, strict=True) if p == part for values in sample["ranges"]]
        problem = judge_ranges(np.array(ranges), levels) if ranges else None
        problems.append({"part": part, "of": len(ranges), **problem}) if problem else None
    misplaced = {name: place for sample in seen for name, place in sample["misplaced"].items()}
    whole = not any(sample["ranges"] and part not in [problem["part"] for problem in problems]
                    for part, sample in zip(parts, seen, strict=True))
    return {"levels": list(levels), "problems": problems, "all_parts": whole,
            "misplaced": len(misplaced), "such_as": dict(list(misplaced.items())[:NAMED])}


def judge_ranges(ranges: np.ndarray, levels: Levels) -> dict | None:
    """Return how many of these files, (n, 2) lowest and highest values, are cut off at white or use a small part of what is
    between black and white, and which values these files use; None where they are less than half."""
    black, white = levels
    low, high = np.minimum(ranges, white).T
    part = PART_OF_RANGE * (white - black)
    for kind, which in (("cut off", ranges[:, 1] > white), ("narrow", (high - low.clip(black) < part) | (low - black > part))):
        if which.mean() >= FILES_THAT_COUNT:
            return {"kind": kind, "files": int(which.sum()), "low": int(np.percentile(ranges[which, 0], 5, method="lower")),
                    "high": int(np.percentile(ranges[which, 1], 95, method="higher"))}
    return None


def describe(found: dict) -> list[str]:
    """Return a warning for each thing that `judge` found, with the cure."""
    lines, (black, white) = [], found["levels"]
    for kind in ("cut off", "narrow"):
        problems = [problem for problem in found["problems"] if problem["kind"] == kind]
        if not problems:
            continue
        low, high = min(problem["low"] for problem in problems), max(problem["high"] for problem in problems)
        parts = "" if found["all_parts"] else f" {' and '.join(problem['part'] for problem in problems)}"
        what = (f"use {low}..{high} of {black}..{white} only" if kind == "narrow"
                else f"reach {high} and are cut off at --white-level {white}")
        counts = f"{sum(problem['files'] for problem in problems)} of {sum(problem['of'] for problem in problems)} files"
        lines.append(f"the 16-bit{parts} files {what} ({counts}), so images have few grey levels; give stage 01 or "
                     f"run_all.sh {cure(low, high)}")
    if found["misplaced"]:
        names = "; ".join(f"in {name} nearly everything is in the {place}" for name, place in found["such_as"].items())
        more = found["misplaced"] - len(found["such_as"])
        lines.append(f"{found['misplaced']} colour images are nearly black in the plane of their own channel: {names}"
                     f"{f'; and {more} more' if more else ''}. Write their planes in the order red, green, blue (OpenCV's is blue, "
                     "green, red)")
    return lines


def cure(low: int, high: int) -> str:
    """Return the flags that map these values to the whole range; without an offset the largest value of so many bits is white."""
    if low > PART_OF_RANGE * (high - low):
        black = min(low, WHOLE.white - 1)
        return f"--black-level {black} --white-level {max(high, black + 1)}"
    return f"--white-level {max(1, 2 ** high.bit_length() - 1)}"


def exposure_warning(work: Path) -> str | None:
    """Return, in one line, what stage 01 warned of when it made the images of a work folder; None where all was well."""
    path = work / "samples.csv"
    found = read_sidecar(path).get("exposure") if sidecar(path).is_file() else None
    lines = describe(found) if found else []
    return f"warning: {'. '.join(lines)}" if lines else None
