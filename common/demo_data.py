"""Make demo data: drawn fluorescence images in the layout of the competition, at 1/8 of its size.

All lengths are in units of 1/256 of a field's width, so 256 and 384 px files show the same kind of cells. The labels
decide where the protein (green) sits: `PATTERNS` holds one small drawing function a class.

    python -m common.demo_data --data demo
"""

import argparse
import csv
import io
import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import tifffile
from joblib import Parallel, delayed
from tqdm import tqdm

COLOURS = ("red", "green", "blue", "yellow")
UNIT = 256
GRID = 96  # geometry is smooth: it is computed on this grid, then enlarged
SHIFT = 4  # fractional bits of the fixed-point coordinates which OpenCV draws at

# Positives a class in the real train.csv. The demo keeps their order on a flatter scale.
REAL_COUNTS = np.array([12885, 1254, 3621, 1561, 1858, 2513, 1008, 2822, 53, 45, 28, 1093, 688, 537, 1066, 21, 530,
                        210, 902, 1482, 172, 3777, 802, 2965, 322, 8228, 328, 11])
LABELS_PER_SAMPLE = (0.50, 0.38, 0.10, 0.02)  # shares of the samples with 1, 2, 3 and 4 labels
# Locations often seen together, hence drawn together more often than by chance.
COMPANIONS = [{0, 25}, {0, 2}, {0, 3}, {0, 5}, {0, 7}, {0, 23}, {1, 6}, {4, 25}, {6, 25}, {9, 10}, {12, 13}, {14, 15},
              {16, 25}, {17, 14}, {18, 19}, {21, 22}, {21, 25}, {20, 25}, {24, 25}, {26, 25}]


@dataclass(frozen=True)
class Sample:
    """What to draw. `index` seeds the drawing; a planted duplicate copies its `source`."""

    id: str
    part: str
    index: int
    labels: tuple[int, ...]
    size: int
    source: "Sample | None" = None


@dataclass
class Cell:
    """One cell's shape: points (x, y) and lengths in units, angles in radians."""

    centre: np.ndarray
    axes: tuple[float, float]
    angle: float
    nucleus_centre: np.ndarray
    nucleus_axes: tuple[float, float]
    nucleoli: np.ndarray  # (n, 2)
    mtoc: np.ndarray  # the microtubule organizing center
    outward: float  # direction from the nucleus to the organizing center
    mitotic: bool

    def reach_of_nucleus(self, direction):
        """Return the distance from the centre of the nucleus to its rim in a direction (...)."""
        x, y = np.cos(direction), np.sin(direction)
        return 1 / ellipse_norm(x, y, (0, 0), self.nucleus_axes, self.angle)


@dataclass
class Field:
    """The cells of one image and maps of shape (size, size); those without a note are soft masks, 0..1."""

    size: int
    cells: list[Cell]
    owner: np.ndarray  # 0 outside cells, k inside cells[k - 1]
    nucleus_norm: np.ndarray  # 1 on the rim of a nucleus, 0 in its centre
    nucleus: np.ndarray
    to_nucleus: np.ndarray  # units
    to_border: np.ndarray  # units, to the nearest cell outline
    cytoplasm: np.ndarray
    nucleoli: np.ndarray
    microtubules: np.ndarray
    filaments: list[np.ndarray]  # the paths of the microtubules, (n_lines, n_points, 2) a cell
    reticulum: np.ndarray


# --- geometry --------------------------------------------------------------------------------------------------------

def unit_vector(angle):
    """Return (..., 2) for angles (...)."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def smooth_noise(rng, size, bumps):
    """Draw noise (size, size) of about unit variance, `bumps` bumps wide whatever the size."""
    coarse = rng.standard_normal((bumps, bumps), dtype=np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def ellipse_norm(x, y, centre, axes, angle):
    """Return the distance from the centre relative to the ellipse: 1 on the ellipse."""
    dx, dy, c, s = x - float(centre[0]), y - float(centre[1]), float(np.cos(angle)), float(np.sin(angle))
    return np.sqrt(((dx * c + dy * s) / axes[0]) ** 2 + ((dy * c - dx * s) / axes[1]) ** 2)


def spread(rng, n_points, low, high, gap):
    """Throw darts (n, 2) into the square low..high; keep up to `n_points` that are `gap` apart."""
    kept = []
    for dart in rng.uniform(low, high, (150, 2)):
        if len(kept) < n_points and all(np.hypot(*(dart - other)) > gap for other in kept):
            kept.append(dart)
    return np.array(kept)


def make_cell(rng, centre, reach, elongation, mitotic):
    """Draw one cell's shape. A dividing cell is round and holds a condensed plate instead of a nucleus."""
    angle, long_axis, semi = rng.uniform(0, np.pi), reach * rng.uniform(0.9, 1.15), rng.uniform(24, 28)
    axes = (40, 37) if mitotic else (long_axis, max(long_axis * elongation, 34))
    nucleus_axes = (21, 6.5) if mitotic else (semi, semi * rng.uniform(0.75, 0.95))
    middle = centre + rng.uniform(-5, 5, 2)
    outward = angle + rng.choice([0, np.pi]) + rng.normal(0, 0.5)
    toward = unit_vector(outward)
    mtoc = middle + toward * (1 / ellipse_norm(*toward, (0, 0), nucleus_axes, angle) + 7)
    spots = spread(rng, rng.integers(2, 5), -0.6, 0.6, 0.6) * nucleus_axes
    nucleoli = middle + spots @ np.array([unit_vector(angle), unit_vector(angle + np.pi / 2)])
    return Cell(centre, axes, angle, middle, nucleus_axes, nucleoli[:0] if mitotic else nucleoli, mtoc, outward, mitotic)


def make_cells(rng, labels):
    """Place 5 to 9 cells: touching ones for the labels of cell contacts, dividing ones for the spindle."""
    reach = 64 if {16, 22} & set(labels) else rng.uniform(50, 58)
    elongation = rng.uniform(0.65, 0.95)
    return [make_cell(rng, centre, reach, elongation, 17 in labels and rng.random() < 0.85)
            for centre in spread(rng, rng.integers(7, 10), -10, UNIT + 10, 64)]


def territories(rng, cells, size):
    """Return the owner of each pixel and the norm of the nearest nucleus, both (size, size), with uneven outlines."""
    x, y = np.meshgrid(*[(np.arange(GRID, dtype=np.float32) + 0.5) * UNIT / GRID] * 2)
    dx, dy = (7 * smooth_noise(rng, GRID, 6) + 3 * smooth_noise(rng, GRID, 16) for _ in range(2))
    cores = [ellipse_norm(x + dx / 6, y + dy / 6, c.nucleus_centre, c.nucleus_axes, c.angle) for c in cells]
    bodies = [np.minimum(ellipse_norm(x + dx, y + dy, c.centre, c.axes, c.angle), core - 0.6)
              for c, core in zip(cells, cores)]  # the nucleus always belongs to its own cell
    owner, nearest = np.zeros((size, size), np.uint8), np.ones((size, size), np.float32)
    for k, body in enumerate(bodies, 1):
        body = cv2.resize(body, (size, size))
        np.copyto(owner, k, where=body < nearest)
        nearest = np.minimum(nearest, body)
    return owner, cv2.resize(np.min(cores, axis=0), (size, size))


def make_field(rng, labels, size):
    """Place the cells and compute the maps that the channels are drawn from."""
    cells = make_cells(rng, labels)
    owner, norm = territories(rng, cells, size)
    nucleus = np.clip((1 - norm) * 10 + 0.5, 0, 1)
    outline = cv2.morphologyEx(owner, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    to_nucleus, to_border = (cv2.distanceTransform(outside.astype(np.uint8), cv2.DIST_L2, 3) * (UNIT / size)
                             for outside in (nucleus < 0.5, ~outline))
    cytoplasm = blur((owner > 0) * (1 - nucleus), 1.2)
    lace = np.clip(1.25 - 1.3 * np.abs(smooth_noise(rng, size, 60)), 0.2, 1)
    blobs = [np.repeat(c.nucleoli, 3, axis=0) + rng.normal(0, 2, (3 * len(c.nucleoli), 2)) for c in cells]
    field = Field(size, cells, owner, norm, nucleus, to_nucleus, to_border, cytoplasm, None, None,
                  [microtubule_paths(rng, c) for c in cells], lace * np.exp(-to_nucleus / 18) * cytoplasm)
    field.nucleoli = blur(dots(field, rng, blobs, 3.6, 5.2), 0.8) * nucleus
    field.microtubules = strokes(field, field.filaments, 1)
    return field


# --- drawing ---------------------------------------------------------------------------------------------------------

def blur(image, sigma):
    return cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma * len(image) / UNIT)


def fixed_point(field, lengths):
    return np.round(np.asarray(lengths) * (field.size / UNIT * 2**SHIFT)).astype(np.int32, order="C")


def strokes(field, paths, width, clip=True):
    """Draw polylines of three strengths, cut at the outline of their cell.

    paths : one array of shape (n_lines, n_points, 2) a cell
    """
    width = width * field.size / UNIT
    thickness = max(1, round(width))
    canvas = np.zeros((field.size, field.size), np.uint8)
    for k, lines in enumerate(paths, 1):
        layer, lines = np.zeros_like(canvas), fixed_point(field, lines)
        for start, level in enumerate((130, 190, 255)):
            level = round(level * min(1, width / thickness))
            cv2.polylines(layer, list(lines[start::3]), False, level, thickness, cv2.LINE_AA, SHIFT)
        np.maximum(canvas, layer, out=canvas, where=(field.owner == k) if clip else True)
    return canvas.astype(np.float32) / 255


def dots(field, rng, points, smallest, largest, hollow=0):
    """Draw discs with radii between the two given, or rings of line width `hollow`.

    points : one array of shape (n, 2) a cell
    """
    canvas = np.zeros((field.size, field.size), np.uint8)
    thickness = max(1, round(hollow * field.size / UNIT)) if hollow else -1
    points = np.concatenate(points)
    radii = fixed_point(field, rng.uniform(smallest, largest, len(points)))
    for point, radius in zip(fixed_point(field, points).tolist(), radii.tolist()):
        cv2.circle(canvas, point, radius, 255, thickness, cv2.LINE_AA, SHIFT)
    return canvas.astype(np.float32) / 255


def wander(rng, starts, headings, length, bend=0.0, wiggle=0.0):
    """Walk `length` from each start (n, 2) along its heading (n,), turning on the way: (n, 10, 2)."""
    n, t = len(starts), np.linspace(0, 1, 10)
    turns = bend * rng.normal(size=(n, 1)) * t + wiggle * np.sin(2 * np.pi * (1.5 * t + rng.random((n, 1))))
    steps = unit_vector(np.reshape(headings, (-1, 1)) + turns) * np.reshape(length, (-1, 1, 1)) / 10
    return np.asarray(starts)[:, None] + np.cumsum(steps, axis=1)


def places(field, rng, where, fewest, most, gap):
    """Choose points (n, 2) in each cell inside the mask, at most one in each square of side `gap`.

    A cell that the border cuts gets fewer of them.
    """
    chosen = []
    for k, cell in enumerate(field.cells, 1):
        rows, columns = np.nonzero(where & (field.owner == k))
        visible = min(1, np.count_nonzero(field.owner == k) / (2.2 * np.prod(cell.axes) * (field.size / UNIT) ** 2))
        n_points = round(rng.integers(fewest, most + 1) * visible) if len(rows) else 0
        picks = rng.integers(0, max(len(rows), 1), 4 * n_points)
        points = np.stack([columns[picks], rows[picks]], axis=-1) * (UNIT / field.size)
        _, first = np.unique(points // gap, axis=0, return_index=True)
        chosen.append(points[np.sort(first)[:n_points]])
    return chosen


def headings_from(points, origin):
    return np.arctan2(*(points - origin).T[::-1])


def spindle_paths(cell):
    """Return the lines (9, 10, 2) between the two poles of a spindle, across the chromatin plate."""
    t, bow = np.linspace(-1, 1, 10)[:, None], np.linspace(-17, 17, 9)[:, None, None]
    along, aside = unit_vector(cell.angle + np.pi / 2), unit_vector(cell.angle)
    return cell.nucleus_centre + 25 * t * along + bow * np.cos(t * np.pi / 2) * aside


def microtubule_paths(rng, cell):
    """Return filaments (n, 10, 2) that radiate from the organizing center, or the spindle of a dividing cell."""
    if cell.mitotic:
        return spindle_paths(cell)
    headings = rng.permutation(np.linspace(0, 2 * np.pi, 48)) + rng.normal(0, 0.15, 48)
    starts = cell.mtoc + rng.normal(0, 3, (48, 2))
    return wander(rng, starts, headings, rng.uniform(40, 90, 48), bend=1.0, wiggle=0.12)


# --- one pattern a class: (field, rng) -> image (size, size), about 0..1 ---------------------------------------------

def nucleoplasm(field, rng):
    return 0.6 * field.nucleus * (1 - 0.85 * field.nucleoli)


def nuclear_membrane(field, rng):
    return 1.1 * np.exp(-(((field.nucleus_norm - 1) / 0.12) ** 2)) + 0.1 * field.nucleus


def nucleoli(field, rng):
    return field.nucleoli + 0.15 * field.nucleus


def fibrillar_center(field, rng):
    spots = [np.repeat(c.nucleoli, 3, axis=0) for c in field.cells]
    return dots(field, rng, [s + rng.normal(0, 2.6, s.shape) for s in spots], 1.2, 1.7)


def nuclear_speckles(field, rng):
    points = places(field, rng, (field.nucleus > 0.8) & (field.nucleoli < 0.3), 22, 32, gap=5)
    return blur(dots(field, rng, points, 1.2, 2.5), 0.7) * 1.1 + 0.15 * field.nucleus


def nuclear_bodies(field, rng):
    points = places(field, rng, (field.nucleus > 0.95) & (field.nucleoli < 0.1), 4, 6, gap=11)
    return np.maximum(dots(field, rng, points, 3.2, 4), 0.25 * field.nucleus)


def endoplasmic_reticulum(field, rng):
    return 1.3 * field.reticulum


def golgi(field, rng):
    paths = []
    for cell in field.cells:
        around = cell.outward + np.linspace(-1.1, 1.1, 10) + rng.normal(0, 0.2, (6, 1))
        radius = cell.reach_of_nucleus(around) + rng.uniform(4, 13, (6, 1)) + rng.normal(0, 1, (6, 10))
        paths.append(cell.nucleus_centre + radius[..., None] * unit_vector(around))
    return blur(strokes(field, paths, 3), 0.7) * (1 - 0.8 * field.nucleus) * 1.3


def peroxisomes(field, rng):
    return dots(field, rng, places(field, rng, field.cytoplasm > 0.8, 80, 110, gap=5), 1.1, 1.5)


def endosomes(field, rng):
    spots = dots(field, rng, places(field, rng, field.cytoplasm > 0.8, 16, 24, gap=8), 1.2, 4)
    return np.maximum(spots, 0.22 * field.cytoplasm)


def lysosomes(field, rng):
    points = places(field, rng, (field.to_nucleus > 2) & (field.to_nucleus < 14), 24, 32, gap=6.5)
    return dots(field, rng, points, 2.4, 3.8, hollow=1.6)


def intermediate_filaments(field, rng):
    paths = []
    for cell in field.cells:
        around = rng.uniform(0, 2 * np.pi, (16, 1)) + np.linspace(0, rng.uniform(1.2, 2.4, 16), 10).T
        waves = 3 * np.sin(6 * around + rng.uniform(0, 2 * np.pi, (16, 1)))
        radius = cell.reach_of_nucleus(around) + rng.uniform(2, 26, (16, 1)) + waves
        paths.append(cell.nucleus_centre + radius[..., None] * unit_vector(around))
    return blur(strokes(field, paths, 2.4), 0.6) * (1 - 0.7 * field.nucleus) * 1.2


def actin_filaments(field, rng):
    paths = []
    for cell in field.cells:
        offsets = rng.uniform(-60, 60, 26)[:, None] * unit_vector(cell.angle + np.pi / 2)
        starts = cell.centre + offsets - rng.uniform(30, 70, (26, 1)) * unit_vector(cell.angle)
        paths.append(wander(rng, starts, cell.angle + rng.normal(0, 0.04, 26), rng.uniform(60, 140, 26)))
    return strokes(field, paths, 1.7)


def focal_adhesion_sites(field, rng):
    rim = (field.to_border > 6) & (field.to_border < 12) & (field.cytoplasm > 0.5)
    points = places(field, rng, rim, 8, 12, gap=15)
    return strokes(field, [wander(rng, p, headings_from(p, c.centre), rng.uniform(12, 17, len(p)))
                           for p, c in zip(points, field.cells)], 4.5)


def microtubules(field, rng):
    bundles = strokes(field, [lines[::2] for lines in field.filaments], 2)
    return bundles * (1 - 0.6 * field.nucleus)


def microtubule_ends(field, rng):
    points = places(field, rng, (field.to_nucleus > 8) & (field.cytoplasm > 0.5), 24, 32, gap=8)
    comets = strokes(field, [wander(rng, p, headings_from(p, c.mtoc), 6) for p, c in zip(points, field.cells)], 2.2)
    return np.maximum(comets, 0.4 * field.microtubules)


def cytokinetic_bridge(field, rng):
    centres, paths = np.array([c.nucleus_centre for c in field.cells]), []
    for centre in centres:
        neighbour = centres[np.argsort(np.hypot(*(centres - centre).T))[1]]
        middle, toward = (centre + neighbour) / 2, (neighbour - centre) / np.hypot(*(neighbour - centre))
        paths.append(middle + np.array([[[-20], [-4]], [[4], [20]], [[-20], [-4]], [[4], [20]]]) * toward)
    return blur(strokes(field, paths, 7, clip=False), 0.9) * 1.1


def mitotic_spindle(field, rng):
    dividing = [c for c in field.cells if c.mitotic]
    poles = [spindle_paths(c)[0, [0, -1]] for c in dividing]
    return np.maximum(strokes(field, [spindle_paths(c) for c in dividing], 1.8, clip=False),
                      dots(field, rng, poles + [np.zeros((0, 2))], 3, 4))


def organizing_center(field, rng):
    rays = [wander(rng, np.tile(c.mtoc, (12, 1)), np.linspace(0, 2 * np.pi, 12), rng.uniform(18, 28, 12), bend=0.3)
            for c in field.cells]
    spots = dots(field, rng, [c.mtoc[None] for c in field.cells], 5, 6)
    return blur(np.maximum(spots, 0.8 * strokes(field, rays, 1.6)), 1) * 1.2


def centrosome(field, rng):
    offsets = 6.5 * unit_vector(rng.uniform(0, 2 * np.pi, len(field.cells)))
    return 1.2 * dots(field, rng, [c.mtoc + [[1], [-1]] * offset for c, offset in zip(field.cells, offsets)], 3, 3.6)


def lipid_droplets(field, rng):
    points = places(field, rng, (field.cytoplasm > 0.9) & (field.to_border > 5), 9, 13, gap=15)
    return dots(field, rng, points, 5, 7, hollow=1.8)


def plasma_membrane(field, rng):
    return np.exp(-((field.to_border / 2.2) ** 2))


def cell_junctions(field, rng):
    lowest, highest = (act(field.owner, np.ones((3, 3), np.uint8)) for act in (cv2.erode, cv2.dilate))
    apart = ((lowest == 0) | (lowest == highest)).astype(np.uint8)
    to_contact = cv2.distanceTransform(apart, cv2.DIST_L2, 3) * (UNIT / field.size)
    return 1.2 * np.exp(-((to_contact / 3.5) ** 2))


def mitochondria(field, rng):
    points = places(field, rng, field.cytoplasm > 0.9, 40, 52, gap=7)
    return blur(strokes(field, [wander(rng, p, rng.uniform(0, 2 * np.pi, len(p)), 12, bend=0.6, wiggle=0.6)
                                for p in points], 2.4), 0.5) * (1 - 0.9 * field.nucleus) * 1.2


def aggresome(field, rng):
    blobs = [c.mtoc + 6 * unit_vector(c.outward) + rng.normal(0, 4.5, (8, 2)) for c in field.cells]
    return blur(dots(field, rng, blobs, 6, 9.5), 0.8) * 1.4


def cytosol(field, rng):
    return 0.5 * field.cytoplasm


def cytoplasmic_bodies(field, rng):
    points = places(field, rng, (field.cytoplasm > 0.9) & (field.to_border > 6), 4, 8, gap=20)
    return dots(field, rng, points, 5, 5.8) * 1.2


def rods_and_rings(field, rng):
    inside = (field.cytoplasm > 0.9) & (field.to_border > 8)
    rings, rods = places(field, rng, inside, 1, 2, gap=30), places(field, rng, inside, 2, 4, gap=20)
    rods = [wander(rng, p, rng.uniform(0, 2 * np.pi, len(p)), 34, bend=0.2) for p in rods]
    return 1.1 * np.maximum(dots(field, rng, rings, 10, 12, hollow=3), strokes(field, rods, 3.2))


PATTERNS = dict(enumerate((
    nucleoplasm, nuclear_membrane, nucleoli, fibrillar_center, nuclear_speckles, nuclear_bodies,
    endoplasmic_reticulum, golgi, peroxisomes, endosomes, lysosomes, intermediate_filaments, actin_filaments,
    focal_adhesion_sites, microtubules, microtubule_ends, cytokinetic_bridge, mitotic_spindle, organizing_center,
    centrosome, lipid_droplets, plasma_membrane, cell_junctions, mitochondria, aggresome, cytosol,
    cytoplasmic_bodies, rods_and_rings)))


# --- one sample ------------------------------------------------------------------------------------------------------

def camera(image, gain, grain):
    """Record as a microscope does: blur, stray light, darker corners, shot and read noise, 8 bits."""
    size = len(image)
    haze = cv2.resize(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA), (size, size))
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    image = (blur(image, 0.6) + 0.1 * haze) * (gain - 0.15 * gain * (axis**2 + axis[:, None] ** 2))
    # Finer pixels get more noise, so that both sizes look alike once they are reduced.
    noise = grain * (size / UNIT) * (0.01 + 0.05 * np.sqrt(image))
    return np.clip(255 * (image + noise), 0, 255).astype(np.uint8)


def per_cell(field, values, outside=1.0):
    """Spread one value a cell over the pixels that it owns."""
    return np.append(outside, values).astype(np.float32)[field.owner]


def draw_sample(rng, labels, size):
    """Draw one field: dict colour -> uint8 (size, size)."""
    field = make_field(rng, labels, size)
    n_cells = len(field.cells)
    green = rng.uniform(0.03, 0.06) * field.cytoplasm
    for label in labels:
        green = np.maximum(green, rng.uniform(0.85, 1.1) * PATTERNS[label](field, rng))
    texture = 1 + 0.12 * smooth_noise(rng, size, 44) + 0.1 * smooth_noise(rng, size, 10)
    mitotic = per_cell(field, [c.mitotic for c in field.cells], 0)
    fade = np.exp(-field.to_nucleus / 40) * (1 - 0.75 * field.nucleus) * (field.owner > 0)
    planes = {
        "red": (0.12 + 0.88 * field.microtubules) * fade * per_cell(field, rng.uniform(0.7, 1.2, n_cells)),
        "green": green * per_cell(field, rng.uniform(0.7, 1.1, n_cells)),
        "blue": (0.6 + 0.4 * mitotic) * field.nucleus * (1 - 0.5 * field.nucleoli) * texture,
        "yellow": 0.8 * field.reticulum * per_cell(field, rng.uniform(0.7, 1.2, n_cells)),
    }
    grain = rng.standard_normal((size, size), dtype=np.float32)  # slow to draw, so one serves all channels, turned
    return {colour: camera(planes[colour] * texture, rng.uniform(0.8, 1.05), np.rot90(grain, turn))
            for turn, colour in enumerate(COLOURS)}


# --- which samples ---------------------------------------------------------------------------------------------------

def class_quotas(n_samples):
    """Return how many of `n_samples` samples show each class (28,): a long tail like the real one."""
    per_1000 = 26 + 228 * REAL_COUNTS / REAL_COUNTS.max()
    return np.maximum(1, np.round(per_1000 * n_samples / 1000)).astype(int)


def draw_labels(rng, n_samples):
    """Draw the labels of each sample, rarest class first; the commonest fills what is left."""
    labels = [[] for _ in range(n_samples)]
    sizes = rng.permutation(np.searchsorted(np.cumsum(LABELS_PER_SAMPLE), (np.arange(n_samples) + 0.5) / n_samples) + 1)
    quotas = class_quotas(n_samples)
    for label in np.argsort(REAL_COUNTS, kind="stable").tolist():
        vacant = np.array([i for i in range(n_samples) if len(labels[i]) < sizes[i]], int)
        if not len(vacant):
            break
        weights = np.array([6 if any({label, other} in COMPANIONS for other in labels[i]) else 1 for i in vacant])
        weights = weights * np.array([sizes[i] - len(labels[i]) for i in vacant]) ** 2
        quota = len(vacant) if label == REAL_COUNTS.argmax() else min(quotas[label], len(vacant))
        for i in rng.choice(vacant, quota, replace=False, p=weights / weights.sum()):
            labels[i].append(label)
    return [tuple(found) for found in labels]


def new_id(rng):
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def new_size(rng):
    return 256 if rng.random() < 0.6 else 384


def plan_copies(rng, originals, n_train_copies, n_test_copies, index):
    """Plan near-duplicates of samples with common labels; every eighth in train carries other labels."""
    common_first = sorted(originals, key=lambda sample: -REAL_COUNTS[list(sample.labels)].min())
    picks = rng.choice(max(len(originals) // 3, n_train_copies + n_test_copies), n_train_copies + n_test_copies, False)
    copies = []
    for k, pick in enumerate(picks):
        source, part = common_first[pick], "train" if k < n_train_copies else "test"
        labels = ((0,) if source.labels != (0,) else (25,)) if k % 8 == 7 else source.labels
        copies.append(Sample(new_id(rng), part, index + k, labels, source.size, source))
    return copies


def plan_samples(rng, n_train, n_test):
    """Plan the train and test samples; about 4 % of train and 5 % of test are planted near-duplicates."""
    n_train_copies, n_test_copies = -(-n_train // 25), -(-n_test // 20)
    originals = [Sample(new_id(rng), part, 0, labels, new_size(rng))
                 for part, n in (("train", n_train - n_train_copies), ("test", n_test - n_test_copies))
                 for labels in draw_labels(rng, n)]
    originals = [replace(sample, index=k) for k, sample in enumerate(originals)]
    train = [sample for sample in originals if sample.part == "train"]
    return originals + plan_copies(rng, train, n_train_copies, n_test_copies, len(originals))


def plan_external(rng, first_index, n_antibodies=8, n_fields=3):
    """Plan external samples: the fields of one antibody share its labels, mostly rare ones."""
    samples = []
    for labels in draw_labels(rng, n_antibodies):
        name = f"{rng.integers(1000, 70000)}_{rng.integers(1, 1500)}_{rng.choice(list('ABCDEFGH'))}{rng.integers(1, 13)}"
        samples += [Sample(f"{name}_{field}", "external", first_index + len(samples) + field - 1, labels,
                           int(rng.choice([216, 256, 384]))) for field in range(1, n_fields + 1)]
    return samples


# --- files -----------------------------------------------------------------------------------------------------------

def write_bytes(path, content):
    """Write beside the place, then rename, so that a file under its final name is always whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_table(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_bytes(path, text.getvalue().encode())


def encode_tiff(plane):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, plane)
    return buffer.getvalue()


def encode_external(plane, colour):
    """Encode as the atlas does: red in plane R, green in G, blue in B, yellow in R and G alike."""
    rgb = [plane if letter in {"red": "R", "green": "G", "blue": "B", "yellow": "RG"}[colour] else 0 * plane
           for letter in "RGB"]
    # Full chroma: at 1/8 of the size, halving it would blur a single-colour plane visibly.
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.merge(rgb[::-1]), options)[1].tobytes()


def disturb(rng, plane):
    """Return a near-duplicate: moved by a pixel, a little brighter or darker, with a little more noise."""
    noise = rng.normal(0, 1.5, plane.shape)
    return np.clip(np.roll(plane, 1, axis=1) * rng.uniform(0.94, 1.06) + noise, 0, 255).astype(np.uint8)


def sample_paths(folder, sample):
    if sample.part == "external":
        return {colour: folder / "external" / "images" / f"{sample.id}_{colour}.jpg" for colour in COLOURS}
    return {colour: folder / f"{sample.part}_full_size" / f"{sample.id}_{colour}.tif" for colour in COLOURS}


def write_sample(folder, seed, sample):
    """Draw and write one sample, unless its four files are there."""
    cv2.setNumThreads(1)  # the processes already share the cores
    paths = sample_paths(folder, sample)
    if all(path.exists() for path in paths.values()):
        return
    drawn = sample.source or sample
    planes = draw_sample(np.random.default_rng([seed, drawn.index]), drawn.labels, sample.size)
    if sample.source:
        rng = np.random.default_rng([seed, sample.index])
        planes = {colour: disturb(rng, plane) for colour, plane in planes.items()}
    for colour, path in paths.items():
        encoded = encode_external(planes[colour], colour) if sample.part == "external" else encode_tiff(planes[colour])
        write_bytes(path, encoded)


def target(sample):
    return " ".join(map(str, sample.labels))


def write_tables(folder, samples):
    """Write the csv files, train.csv last: it says that everything is there."""
    rows = {part: sorted((s.id, target(s)) for s in samples if s.part == part) for part in ("train", "test", "external")}
    write_table(folder / "external" / "external.csv", ("Id", "Target"), rows["external"])
    write_table(folder / "planted_duplicates.csv", ("Id", "duplicate_of", "part"),
                sorted((s.id, s.source.id, s.part) for s in samples if s.source))
    write_table(folder / "sample_submission.csv", ("Id", "Predicted"), [(id_, 0) for id_, _ in rows["test"]])
    write_table(folder / "train.csv", ("Id", "Target"), rows["train"])


def refuse_other_data(folder, samples):
    """Raise FileExistsError where train.csv lists other samples than ours: it may be somebody's real data."""
    table = folder / "train.csv"
    if not table.exists():
        return
    with table.open(newline="") as lines:
        found = {row["Id"] for row in csv.DictReader(lines)}
    if found != {s.id for s in samples if s.part == "train"}:
        raise FileExistsError(f"{table} lists other samples than this demo's; give an empty folder for the demo data")


def make_demo_data(folder: Path, seed: int = 0, n_train: int = 1000, n_test: int = 120, jobs: int = -1) -> None:
    """Write demo data in the competition's layout; an interrupted run is finished by the next.

    Parameters
    ----------
    folder : where to; made if missing
    seed : the same seed and numbers give the same bytes, whatever `jobs`
    n_train, n_test : number of samples, planted duplicates included
    jobs : number of processes, -1 for one a core

    Raises
    ------
    FileExistsError
        The folder holds other data.
    """
    folder = Path(folder)
    rng = np.random.default_rng([seed, n_train, n_test])
    samples = plan_samples(rng, n_train, n_test)
    samples += plan_external(rng, len(samples))
    refuse_other_data(folder, samples)
    for name in ("train_full_size", "test_full_size", "external/images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(write_sample)(folder, seed, s) for s in samples)
    for _ in tqdm(work, "demo data", len(samples), disable=None):
        pass
    write_tables(folder, samples)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        make_demo_data(arguments.data, arguments.seed)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
