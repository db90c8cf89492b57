"""Near-duplicates by perceptual hashing: hashes, all pairs within a distance, groups, and which samples stay."""

from collections.abc import Sequence
from pathlib import Path

import faiss
import imagehash
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.data.images import CHANNELS, read_planes
from common.data.labels import parse_targets
from common.errors import listing
from common.process.parallel import run_parallel

HASHED = CHANNELS[:3]  # red, green, blue; yellow is missing from some collections
FLAT_STD = 0.5  # grey levels; a channel that varies less is black or constant, and its hash is meaningless
BLOCK = 8192  # hashes searched at once
ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)  # set bits of each byte


def hash_planes(planes: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the 64-bit pHashes of red, green and blue, (3, 8) uint8, and whether any of them is flat.

    planes : (4, side, side) uint8
    """
    hashes = [np.packbits(imagehash.phash(Image.fromarray(plane)).hash) for plane in planes[:3]]
    return np.stack(hashes), any(plane.std() < FLAT_STD for plane in planes[:3])


def hash_file(path: Path, crc: str) -> tuple[np.ndarray, bool]:
    """`hash_planes` of a stored image, whose pixels have the checksum `crc`."""
    return hash_planes(read_planes(path, crc))


def hash_images(folder: Path, ids: Sequence[str], crcs: Sequence[str], n_jobs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of stored images, (n, 3, 8) uint8, and which are flat, (n,) bool.

    crcs : the checksums of their pixels
    """
    hashes, flat = np.empty((len(ids), 3, 8), dtype=np.uint8), np.empty(len(ids), dtype=bool)
    jobs = [(folder.resolve() / f"{Id}.tif", crc) for Id, crc in zip(ids, crcs, strict=True)]
    for i, result in run_parallel(hash_file, jobs, n_jobs, "hashing"):
        hashes[i], flat[i] = result
    return hashes, flat


def find_pairs(hashes: np.ndarray, flat: np.ndarray, thresholds: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Find all pairs whose Hamming distance is within the threshold in each of red, green and blue.

    hashes : (n, 3, 8) uint8; flat : (n,) bool, samples that never match; thresholds : bits of 64 per channel
    Returns pairs (p, 2) with first < second, sorted, and distances (p, 3). Exact: every pair is compared.
    """
    usable = np.flatnonzero(~flat)
    green = np.ascontiguousarray(hashes[usable, 1])
    index = faiss.IndexBinaryFlat(64)
    found = []
    for start in range(0, len(usable), BLOCK):
        block = green[start : start + BLOCK]
        index.add(block)  # so that each block is only compared with earlier ones
        limits, _, others = index.range_search(block, thresholds[1] + 1)
        limits = np.asarray(limits, dtype=np.int64)
        second = np.repeat(np.arange(start, start + len(block)), np.diff(limits))
        pairs = np.stack([usable[others], usable[second]], axis=1)[others < second]
        distances = ONES[hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]].sum(axis=2, dtype=np.int64)
        near = (distances <= thresholds).all(axis=1)
        found.append(np.hstack([pairs[near], distances[near]]))
    table = np.concatenate(found) if found else np.empty((0, 5), dtype=np.int64)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    return table[:, :2], table[:, 2:]


def connect(n: int, pairs: np.ndarray) -> np.ndarray:
    """Return for each of n samples the index of the first sample of its connected component, (n,) int."""
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def choose_kept(groups: np.ndarray, targets: np.ndarray, floor: int) -> np.ndarray:
    """Keep the first sample of each distinct label set per group; returns (n,) bool.

    A duplicate stays too if its removal would take a class below `floor` kept samples.
    """
    kept = np.ones(len(groups), dtype=bool)
    counts = targets.sum(axis=0)
    seen = set()
    for i, group in enumerate(groups):
        key = (group, targets[i].tobytes())
        if key in seen and (counts[targets[i]] > floor).all():
            kept[i] = False
            counts[targets[i]] -= 1
        seen.add(key)
    return kept


def antibodies(samples: pd.DataFrame) -> np.ndarray:
    """Return pairs (p, 2) that link each external sample to the first sample of its antibody.

    An external Id is <antibody>_<plate>_<well>_<field>: fields of one antibody show the same protein.
    """
    external = np.flatnonzero(samples["part"] == "external")
    antibody = samples["Id"].iloc[external].str.split("_").str[0].to_numpy()
    _, first, which = np.unique(antibody, return_index=True, return_inverse=True)
    return np.stack([external[first[which]], external], axis=1)


def agreement(targets: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of two label sets' labels that are in both, (n,): 1 for equal sets, 0 for disjoint ones."""
    return (targets & others).sum(axis=1) / np.maximum(1, (targets | others).sum(axis=1))


def pair_table(samples: pd.DataFrame, pairs: np.ndarray, distances: np.ndarray) -> pd.DataFrame:
    """Return pairs as a table: Ids, parts, bits of distance per channel, labels, their agreement (empty for test)."""
    first, second = (samples.iloc[pairs[:, side]].reset_index(drop=True) for side in (0, 1))
    table = pd.DataFrame(
        {
            "Id": first["Id"],
            "part": first["part"],
            "other_Id": second["Id"],
            "other_part": second["part"],
            **{channel: distances[:, c] for c, channel in enumerate(HASHED)},
            "Target": first["Target"],
            "other_Target": second["Target"],
        }
    )
    labels = agreement(parse_targets(first["Target"]), parse_targets(second["Target"]))
    known = (first["part"] != "test") & (second["part"] != "test")
    return table.assign(agreement=[f"{value:.2f}" if told else "" for value, told in zip(labels, known, strict=True)])


def duplicate_tables(
    samples: pd.DataFrame,
    hashes: np.ndarray,
    flat: np.ndarray,
    thresholds: tuple[int, int, int],
    floor: int,
    by_antibody: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of labelled samples with near_group, group and kept, and the table of all near-identical pairs.

    samples : Id, part, Target from stage 01; test samples are matched, but never grouped or removed
    by_antibody : whether the external fields of one antibody are a group for folds; they do not replace each other
    """
    pairs, distances = find_pairs(hashes, flat, thresholds)
    labelled = np.flatnonzero(samples["part"] != "test")
    position = np.full(len(samples), -1)
    position[labelled] = np.arange(len(labelled))
    inner = position[pairs]
    inner = inner[(inner >= 0).all(axis=1)]
    known = samples.iloc[labelled].reset_index(drop=True)
    near = connect(len(known), inner)
    groups = connect(len(known), np.vstack([inner, antibodies(known)])) if by_antibody else near
    ids = known["Id"].to_numpy()
    duplicates = known[["Id", "part", "Target"]].assign(
        near_group=ids[near],
        group=ids[groups],
        kept=choose_kept(near, parse_targets(known["Target"]), floor).astype(int),
    )
    return duplicates, pair_table(samples, pairs, distances)


def doubtful_pairs(
    samples: pd.DataFrame, hashes: np.ndarray, flat: np.ndarray, thresholds: tuple[int, int, int], beyond: int, n: int
) -> pd.DataFrame:
    """Return the `n` pairs just outside the thresholds: within `beyond` bits more, the closest first."""
    red, green, blue = thresholds
    pairs, distances = find_pairs(hashes, flat, (red + beyond, green + beyond, blue + beyond))
    excess = (distances - thresholds).max(axis=1)
    order = np.flatnonzero(excess > 0)
    order = order[np.argsort(excess[order], kind="stable")][:n]
    return pair_table(samples, pairs[order], distances[order])


def describe_duplicates(
    samples: pd.DataFrame, flat: np.ndarray, duplicates: pd.DataFrame, pairs: pd.DataFrame, pair_file: Path
) -> list[str]:
    """Say how many duplicates there are and are left out, and which match test and external samples."""
    groups = duplicates["near_group"].value_counts()
    lines = [
        f"{(groups > 1).sum()} groups of near-identical samples; {(duplicates['kept'] == 0).sum()} of "
        f"{len(duplicates)} labelled samples are left out of training"
    ]
    if flat.any():
        unusable = listing(samples["Id"][flat])
        lines.append(f"{flat.sum()} samples have a black or constant channel and match nothing:\n{unusable}")
    parts = pairs[["part", "other_part"]].apply(frozenset, axis=1) if len(pairs) else pairs["part"]
    for part in ("test", "external"):
        some = pairs[[len(both) == 2 and part in both for both in parts]]
        if len(some):
            bits = some[list(HASHED)].astype(str).agg("/".join, axis=1)
            agreed = some["agreement"].where(some["agreement"] == "", "  labels agree " + some["agreement"])
            lines.append(
                f"{len(some)} pairs join {part} samples with other parts (kept; listed in {pair_file}); bits apart:\n"
                f"{listing(some['Id'] + '  ~  ' + some['other_Id'] + '  ' + bits + agreed)}"
            )
    return lines
