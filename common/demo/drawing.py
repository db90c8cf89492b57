"""Draw fluorescence images of cells: four channels, with a green pattern where the labels say.

All lengths are in units of 1/256 of a field's width, so 256 and 384 px files show the same kind of cells.
`PATTERNS` holds one small drawing function per class.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from common.data.images import CHANNELS

UNIT = 256
GRID = 96  # geometry is smooth: it is computed on this grid, then enlarged
SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates
Numbers = float | np.ndarray
Point = tuple[float, float] | np.ndarray


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


@dataclass
class Field:
    """The cells of one image and maps of shape (size, size); maps without a comment are soft masks, 0..1."""

    size: int
    cells: list[Cell]
    owner: np.ndarray  # 0 outside cells, k inside cells[k - 1]
    nucleus_norm: np.ndarray  # 1 on the rim of a nucleus, 0 in its centre
    nucleus: np.ndarray
    to_nucleus: np.ndarray  # units
    to_border: np.ndarray  # units, to the nearest cell outline
    cytoplasm: np.ndarray
    nucleoli: np.ndarray = dataclasses.field(init=False)
    microtubules: np.ndarray = dataclasses.field(init=False)
    filaments: list[np.ndarray]  # the paths of the microtubules, (n_lines, n_points, 2) per cell
    reticulum: np.ndarray


# --- geometry --------------------------------------------------------------------------------------------------------


def unit_vector(angle: Numbers) -> np.ndarray:
    """Return (..., 2) for angles (...)."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def smooth_noise(rng: np.random.Generator, size: int, bumps: int) -> np.ndarray:
    """Draw noise (size, size) of about unit variance, `bumps` bumps wide at any size."""
    coarse = rng.standard_normal((bumps, bumps), dtype=np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def ellipse_norm(x: np.ndarray, y: np.ndarray, centre: Point, axes: tuple[float, float], angle: float) -> np.ndarray:
    """Return the distance from the centre relative to the ellipse: 1 on the ellipse."""
    dx, dy, c, s = x - float(centre[0]), y - float(centre[1]), float(np.cos(angle)), float(np.sin(angle))
    return np.sqrt(((dx * c + dy * s) / axes[0]) ** 2 + ((dy * c - dx * s) / axes[1]) ** 2)


def ellipse_radius(direction: Numbers, axes: tuple[float, float], angle: float) -> Numbers:
    """Return the distance from the centre to the ellipse in each direction (...)."""
    return 1 / ellipse_norm(np.cos(direction), np.sin(direction), (0, 0), axes, angle)


def spread(rng: np.random.Generator, n_points: int | np.integer, low: float, high: float, gap: float) -> np.ndarray:
    """Throw darts (n, 2) into the square low..high; keep up to `n_points` that are `gap` apart."""
    kept: list[np.ndarray] = []
    for dart in rng.uniform(low, high, (150, 2)):
        if len(kept) < n_points and all(np.hypot(*(dart - other)) > gap for other in kept):
            kept.append(dart)
    return np.array(kept)


def make_cell(rng: np.random.Generator, centre: np.ndarray, reach: float, elongation: float, mitotic: bool) -> Cell:
    """Draw one cell's shape. A dividing cell is round and holds a condensed plate instead of a nucleus."""
    angle, long_axis, semi = rng.uniform(0, np.pi), reach * rng.uniform(0.9, 1.15), rng.uniform(25, 28)
    axes = (40, 37) if mitotic else (long_axis, max(long_axis * elongation, 34))
    nucleus_axes = (21, 6.5) if mitotic else (semi, semi * rng.uniform(0.75, 0.95))
    middle = centre + rng.uniform(-5, 5, 2)
    outward = angle + rng.choice([0, np.pi]) + rng.normal(0, 0.5)
    mtoc = middle + unit_vector(outward) * (ellipse_radius(outward, nucleus_axes, angle) + 7)
    spots = spread(rng, rng.integers(2, 5), -0.6, 0.6, 0.6) * nucleus_axes
    nucleoli = middle + spots @ np.array([unit_vector(angle), unit_vector(angle + np.pi / 2)])
    nucleoli = nucleoli[:0] if mitotic else nucleoli
    return Cell(centre, axes, angle, middle, nucleus_axes, nucleoli, mtoc, outward, mitotic)


def make_cells(rng: np.random.Generator, labels: Collection[int]) -> list[Cell]:
    """Place 5 to 9 cells: touching ones for the labels of cell contacts, dividing ones for the spindle."""
    reach = 64 if {16, 22} & set(labels) else rng.uniform(50, 58)
    elongation = rng.uniform(0.65, 0.95)
    return [
        make_cell(rng, centre, reach, elongation, 17 in labels and rng.random() < 0.85)
        for centre in spread(rng, rng.integers(7, 10), -10, UNIT + 10, 64)
    ]


def territories(rng: np.random.Generator, cells: list[Cell], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the owner of each pixel and the norm of the nearest nucleus, both (size, size), with uneven outlines."""
    x, y = np.meshgrid(*[(np.arange(GRID, dtype=np.float32) + 0.5) * UNIT / GRID] * 2)
    dx, dy = (7 * smooth_noise(rng, GRID, 6) + 3 * smooth_noise(rng, GRID, 16) for _ in range(2))
    cores = [ellipse_norm(x + dx / 6, y + dy / 6, c.nucleus_centre, c.nucleus_axes, c.angle) for c in cells]
    bodies = [
        np.minimum(ellipse_norm(x + dx, y + dy, c.centre, c.axes, c.angle), core - 0.6)
        for c, core in zip(cells, cores, strict=True)
    ]  # the nucleus always belongs to its own cell
    owner, nearest = np.zeros((size, size), np.uint8), np.ones((size, size), np.float32)
    for k, body in enumerate(bodies, 1):
        body = cv2.resize(body, (size, size))
        np.copyto(owner, k, where=body < nearest)
        nearest = np.minimum(nearest, body)
    return owner, cv2.resize(np.min(cores, axis=0), (size, size))


def make_field(rng: np.random.Generator, labels: Collection[int], size: int) -> Field:
    """Place the cells and compute the maps that the channels are drawn from."""
    cells = make_cells(rng, labels)
    owner, norm = territories(rng, cells, size)
    nucleus = np.clip((1 - norm) * 10 + 0.5, 0, 1)
    outline = cv2.morphologyEx(owner, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    to_nucleus, to_border = (
        cv2.distanceTransform(outside.astype(np.uint8), cv2.DIST_L2, 3) * (UNIT / size)
        for outside in (nucleus < 0.5, ~outline)
    )
    cytoplasm = blur((owner > 0) * (1 - nucleus), 1.2)
    lace = np.clip(1.25 - 1.3 * np.abs(smooth_noise(rng, size, 60)), 0.2, 1)
    blobs = [np.repeat(c.nucleoli, 3, axis=0) + rng.normal(0, 2, (3 * len(c.nucleoli), 2)) for c in cells]
    field = Field(
        size,
        cells,
        owner,
        norm,
        nucleus,
        to_nucleus,
        to_border,
        cytoplasm,
        [microtubule_paths(rng, c) for c in cells],
        lace * np.exp(-to_nucleus / 18) * cytoplasm,
    )
    field.nucleoli = blur(dots(field, rng, blobs, 3.6, 5.2), 0.8) * nucleus
    field.microtubules = strokes(field, field.filaments, 1)
    return field


# --- drawing ---------------------------------------------------------------------------------------------------------


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma * len(image) / UNIT)


def fixed_point(field: Field, lengths: np.ndarray) -> np.ndarray:
    return np.round(np.asarray(lengths) * (field.size / UNIT * 2**SHIFT)).astype(np.int32, order="C")


def strokes(field: Field, paths: Sequence[np.ndarray], width: float, clip: bool = True) -> np.ndarray:
    """Draw polylines of three strengths, clipped to the outline of their cell.

    paths : one array of shape (n_lines, n_points, 2) per cell
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


def dots(
    field: Field,
    rng: np.random.Generator,
    points: Sequence[np.ndarray],
    smallest: float,
    largest: float,
    hollow: float = 0,
) -> np.ndarray:
    """Draw discs with radii between two limits, or rings of line width `hollow`.

    points : one array of shape (n, 2) per cell
    """
    canvas = np.zeros((field.size, field.size), np.uint8)
    thickness = max(1, round(hollow * field.size / UNIT)) if hollow else -1
    centres = np.concatenate(points)
    radii = fixed_point(field, rng.uniform(smallest, largest, len(centres)))
    for point, radius in zip(fixed_point(field, centres).tolist(), radii.tolist(), strict=True):
        cv2.circle(canvas, point, radius, 255, thickness, cv2.LINE_AA, SHIFT)
    return canvas.astype(np.float32) / 255


def wander(
    rng: np.random.Generator,
    starts: np.ndarray,
    headings: np.ndarray,
    length: Numbers,
    bend: float = 0.0,
    wiggle: float = 0.0,
) -> np.ndarray:
    """Walk `length` from each start (n, 2) along its heading (n,), turning on the way; returns (n, 10, 2)."""
    n, t = len(starts), np.linspace(0, 1, 10)
    turns = bend * rng.normal(size=(n, 1)) * t + wiggle * np.sin(2 * np.pi * (1.5 * t + rng.random((n, 1))))
    steps = unit_vector(np.reshape(headings, (-1, 1)) + turns) * np.reshape(length, (-1, 1, 1)) / 10
    return np.asarray(starts)[:, None] + np.cumsum(steps, axis=1)


def places(
    field: Field, rng: np.random.Generator, where: np.ndarray, fewest: int, most: int, gap: float
) -> list[np.ndarray]:
    """Choose points (n, 2) in each cell inside the mask, at most one in each square of side `gap`.

    A cell cut by the border gets fewer points.
    """
    chosen = []
    for k, cell in enumerate(field.cells, 1):
        rows, columns = np.nonzero(where & (field.owner == k))
        visible = min(
            1.0, float(np.count_nonzero(field.owner == k) / (2.2 * np.prod(cell.axes) * (field.size / UNIT) ** 2))
        )
        n_points = round(rng.integers(fewest, most + 1) * visible) if len(rows) else 0
        picks = rng.integers(0, max(len(rows), 1), 4 * n_points)
        points = np.stack([columns[picks], rows[picks]], axis=-1) * (UNIT / field.size)
        _, first = np.unique(points // gap, axis=0, return_index=True)
        chosen.append(points[np.sort(first)[:n_points]])
    return chosen


def dashes(
    field: Field,
    rng: np.random.Generator,
    points: Sequence[np.ndarray],
    origins: Sequence[np.ndarray],
    shortest: float,
    longest: float,
    width: float,
) -> np.ndarray:
    """Draw a dash at each point (n, 2) of a cell, pointing away from the cell's origin (2,)."""
    paths = []
    for start, origin in zip(points, origins, strict=True):
        dx, dy = (start - origin).T
        paths.append(wander(rng, start, np.arctan2(dy, dx), rng.uniform(shortest, longest, len(start))))
    return strokes(field, paths, width)


def arcs(
    field: Field, rng: np.random.Generator, around: Sequence[np.ndarray], farthest: float, waviness: float, width: float
) -> np.ndarray:
    """Draw strands along the rim of each nucleus, up to `farthest` units outside of it.

    around : per cell, one array of directions from the nucleus, of shape (n_lines, n_points)
    """
    paths = []
    for cell, directions in zip(field.cells, around, strict=True):
        n = len(directions)
        waves = waviness * np.sin(6 * directions + rng.uniform(0, 2 * np.pi, (n, 1)))
        radius = ellipse_radius(directions, cell.nucleus_axes, cell.angle) + rng.uniform(3, farthest, (n, 1)) + waves
        paths.append(cell.nucleus_centre + radius[..., None] * unit_vector(directions))
    return blur(strokes(field, paths, width), 0.6) * (1 - 0.8 * field.nucleus)


def spindle_paths(cell: Cell) -> np.ndarray:
    """Return the lines (9, 10, 2) between the two poles of a spindle, across the chromatin plate."""
    t, bow = np.linspace(-1, 1, 10)[:, None], np.linspace(-17, 17, 9)[:, None, None]
    along, aside = unit_vector(cell.angle + np.pi / 2), unit_vector(cell.angle)
    return cell.nucleus_centre + 25 * t * along + bow * np.cos(t * np.pi / 2) * aside


def microtubule_paths(rng: np.random.Generator, cell: Cell) -> np.ndarray:
    """Return filaments (n, 10, 2) that radiate from the organizing center, or the spindle of a dividing cell."""
    if cell.mitotic:
        return spindle_paths(cell)
    headings = rng.permutation(np.linspace(0, 2 * np.pi, 48)) + rng.normal(0, 0.15, 48)
    starts = cell.mtoc + rng.normal(0, 3, (48, 2))
    return wander(rng, starts, headings, rng.uniform(40, 90, 48), bend=1.0, wiggle=0.12)


# --- one pattern per class: (field, rng) -> image (size, size), about 0..1 -------------------------------------------


def nucleoplasm(field: Field, rng: np.random.Generator) -> np.ndarray:
    return 0.6 * field.nucleus * (1 - 0.85 * field.nucleoli)


def nuclear_membrane(field: Field, rng: np.random.Generator) -> np.ndarray:
    return 1.1 * np.exp(-(((field.nucleus_norm - 1) / 0.12) ** 2)) + 0.1 * field.nucleus


def nucleoli(field: Field, rng: np.random.Generator) -> np.ndarray:
    return field.nucleoli + 0.15 * field.nucleus


def fibrillar_center(field: Field, rng: np.random.Generator) -> np.ndarray:
    spots = [np.repeat(c.nucleoli, 2, axis=0) for c in field.cells]
    return 1.3 * dots(field, rng, [s + rng.normal(0, 2.8, s.shape) for s in spots], 2.1, 2.6)


def nuclear_speckles(field: Field, rng: np.random.Generator) -> np.ndarray:
    points = places(field, rng, (field.nucleus > 0.8) & (field.nucleoli < 0.3), 24, 32, gap=5)
    return blur(dots(field, rng, points, 1.2, 2.5), 0.6) * 1.2 + 0.3 * field.nucleus * (1 - field.nucleoli)


def nuclear_bodies(field: Field, rng: np.random.Generator) -> np.ndarray:
    points = places(field, rng, (field.nucleus > 0.95) & (field.nucleoli < 0.1), 2, 3, gap=15)
    return 1.3 * dots(field, rng, points, 5, 6)


def endoplasmic_reticulum(field: Field, rng: np.random.Generator) -> np.ndarray:
    return 1.3 * field.reticulum


def golgi(field: Field, rng: np.random.Generator) -> np.ndarray:
    span = np.linspace(-1.2, 1.2, 10)
    return 1.4 * arcs(
        field,
        rng,
        [c.outward + span * rng.uniform(0.8, 1.1, (6, 1)) + rng.normal(0, 0.2, (6, 1)) for c in field.cells],
        farthest=14,
        waviness=1,
        width=2.8,
    )


def peroxisomes(field: Field, rng: np.random.Generator) -> np.ndarray:
    return 1.3 * dots(field, rng, places(field, rng, field.cytoplasm > 0.8, 60, 80, gap=6), 1.7, 2.1)


def endosomes(field: Field, rng: np.random.Generator) -> np.ndarray:
    spots = dots(field, rng, places(field, rng, field.cytoplasm > 0.8, 14, 20, gap=9), 1.5, 4.5)
    return np.maximum(spots, 0.35 * field.cytoplasm)


def lysosomes(field: Field, rng: np.random.Generator) -> np.ndarray:
    points = places(field, rng, (field.to_nucleus > 3) & (field.to_nucleus < 13), 24, 32, gap=7)
    return 1.2 * dots(field, rng, points, 3, 4.6)


def intermediate_filaments(field: Field, rng: np.random.Generator) -> np.ndarray:
    span = np.linspace(0, 1, 10)
    bundles = arcs(
        field,
        rng,
        [rng.uniform(0, 2 * np.pi, (22, 1)) + span * rng.uniform(0.8, 2, (22, 1)) for _ in field.cells],
        farthest=34,
        waviness=3,
        width=2.4,
    )
    return 1.2 * np.maximum(bundles, 0.25 * field.cytoplasm * np.exp(-field.to_nucleus / 25))


def actin_filaments(field: Field, rng: np.random.Generator) -> np.ndarray:
    paths = []
    for cell in field.cells:
        offsets = rng.uniform(-60, 60, 26)[:, None] * unit_vector(cell.angle + np.pi / 2)
        starts = cell.centre + offsets - rng.uniform(30, 70, (26, 1)) * unit_vector(cell.angle)
        paths.append(wander(rng, starts, cell.angle + rng.normal(0, 0.04, 26), rng.uniform(60, 140, 26)))
    return strokes(field, paths, 1.7)


def focal_adhesion_sites(field: Field, rng: np.random.Generator) -> np.ndarray:
    rim = (field.to_border > 6) & (field.to_border < 12) & (field.cytoplasm > 0.5)
    points = places(field, rng, rim, 10, 14, gap=13)
    return 1.2 * dashes(field, rng, points, [c.centre for c in field.cells], 13, 18, width=4.5)


def microtubules(field: Field, rng: np.random.Generator) -> np.ndarray:
    bundles = strokes(field, [lines[::2] for lines in field.filaments], 2.4)
    return 1.2 * bundles * (1 - 0.4 * field.nucleus)


def microtubule_ends(field: Field, rng: np.random.Generator) -> np.ndarray:
    points = places(field, rng, (field.to_nucleus > 8) & (field.cytoplasm > 0.5), 24, 32, gap=8)
    comets = dashes(field, rng, points, [c.mtoc for c in field.cells], 6, 8, width=2.6)
    return np.maximum(comets, 0.4 * field.microtubules)


def cytokinetic_bridge(field: Field, rng: np.random.Generator) -> np.ndarray:
    centres, paths = np.array([c.nucleus_centre for c in field.cells]), []
    halves = np.array([[[-20], [-4]], [[4], [20]]])  # from the middle, with a gap for the midbody
    for centre in centres:
        neighbour = centres[np.argsort(np.hypot(*(centres - centre).T))[1]]
        toward = (neighbour - centre) / np.hypot(*(neighbour - centre))
        paths.append((centre + neighbour) / 2 + halves * toward)
    return 1.2 * blur(strokes(field, paths, 7, clip=False), 0.9)


def mitotic_spindle(field: Field, rng: np.random.Generator) -> np.ndarray:
    dividing = [c for c in field.cells if c.mitotic]
    poles = [spindle_paths(c)[0, [0, -1]] for c in dividing]
    return np.maximum(
        strokes(field, [spindle_paths(c) for c in dividing], 1.8, clip=False),
        dots(field, rng, poles + [np.zeros((0, 2))], 3, 4),
    )


def organizing_center(field: Field, rng: np.random.Generator) -> np.ndarray:
    rays = [
        wander(rng, np.tile(c.mtoc, (12, 1)), np.linspace(0, 2 * np.pi, 12), rng.uniform(20, 30, 12), bend=0.3)
        for c in field.cells
    ]
    spots = dots(field, rng, [c.mtoc[None] for c in field.cells], 6, 7)
    return blur(np.maximum(spots, 0.9 * strokes(field, rays, 2)), 1) * 1.2


def centrosome(field: Field, rng: np.random.Generator) -> np.ndarray:
    offsets = 6.5 * unit_vector(rng.uniform(0, 2 * np.pi, len(field.cells)))
    return 1.3 * dots(
        field, rng, [c.mtoc + [[1], [-1]] * offset for c, offset in zip(field.cells, offsets, strict=True)], 5, 5.6
    )


def lipid_droplets(field: Field, rng: np.random.Generator) -> np.ndarray:
    points = places(field, rng, (field.cytoplasm > 0.9) & (field.to_border > 6), 8, 11, gap=17)
    return 1.2 * dots(field, rng, points, 5.5, 7.5, hollow=2)


def plasma_membrane(field: Field, rng: np.random.Generator) -> np.ndarray:
    return np.exp(-((field.to_border / 2.2) ** 2))


def cell_junctions(field: Field, rng: np.random.Generator) -> np.ndarray:
    lowest, highest = (act(field.owner, np.ones((3, 3), np.uint8)) for act in (cv2.erode, cv2.dilate))
    apart = ((lowest == 0) | (lowest == highest)).astype(np.uint8)
    to_contact = cv2.distanceTransform(apart, cv2.DIST_L2, 3) * (UNIT / field.size)
    return 1.2 * np.exp(-((to_contact / 3.5) ** 2))


def mitochondria(field: Field, rng: np.random.Generator) -> np.ndarray:
    points = places(field, rng, field.cytoplasm > 0.9, 40, 52, gap=7)
    paths = [wander(rng, p, rng.uniform(0, 2 * np.pi, len(p)), 12, bend=0.6, wiggle=0.6) for p in points]
    return 1.2 * blur(strokes(field, paths, 2.4), 0.5) * (1 - 0.9 * field.nucleus)


def aggresome(field: Field, rng: np.random.Generator) -> np.ndarray:
    blobs = [c.mtoc + 6 * unit_vector(c.outward) + rng.normal(0, 4.5, (8, 2)) for c in field.cells]
    return blur(dots(field, rng, blobs, 6, 9.5), 0.8) * 1.4


def cytosol(field: Field, rng: np.random.Generator) -> np.ndarray:
    return 0.5 * field.cytoplasm


def cytoplasmic_bodies(field: Field, rng: np.random.Generator) -> np.ndarray:
    points = places(field, rng, (field.cytoplasm > 0.9) & (field.to_border > 6), 5, 8, gap=20)
    return dots(field, rng, points, 6.5, 7.5) * 1.2


def rods_and_rings(field: Field, rng: np.random.Generator) -> np.ndarray:
    inside = (field.cytoplasm > 0.9) & (field.to_border > 8)
    rings, rods = places(field, rng, inside, 1, 2, gap=30), places(field, rng, inside, 2, 4, gap=20)
    rods = [wander(rng, p, rng.uniform(0, 2 * np.pi, len(p)), 46, bend=0.2) for p in rods]
    return 1.1 * np.maximum(dots(field, rng, rings, 12, 15, hollow=3.5), strokes(field, rods, 4))


PATTERNS: dict[int, Callable[[Field, np.random.Generator], np.ndarray]] = dict(
    enumerate(
        (
            nucleoplasm,
            nuclear_membrane,
            nucleoli,
            fibrillar_center,
            nuclear_speckles,
            nuclear_bodies,
            endoplasmic_reticulum,
            golgi,
            peroxisomes,
            endosomes,
            lysosomes,
            intermediate_filaments,
            actin_filaments,
            focal_adhesion_sites,
            microtubules,
            microtubule_ends,
            cytokinetic_bridge,
            mitotic_spindle,
            organizing_center,
            centrosome,
            lipid_droplets,
            plasma_membrane,
            cell_junctions,
            mitochondria,
            aggresome,
            cytosol,
            cytoplasmic_bodies,
            rods_and_rings,
        )
    )
)


# --- one sample ------------------------------------------------------------------------------------------------------


def camera(image: np.ndarray, gain: float, grain: np.ndarray) -> np.ndarray:
    """Record an image as a microscope does: blur, stray light, darker corners, shot and read noise, 8 bits."""
    size = len(image)
    haze = cv2.resize(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA), (size, size))
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    image = (blur(image, 0.6) + 0.1 * haze) * (gain - 0.15 * gain * (axis**2 + axis[:, None] ** 2))
    # Finer pixels get more noise, so that both sizes look the same once they are reduced.
    noise = grain * (size / UNIT) * (0.01 + 0.05 * np.sqrt(image))
    return np.clip(255 * (image + noise), 0, 255).astype(np.uint8)


def per_cell(field: Field, values: Sequence[float] | np.ndarray, outside: float = 1.0) -> np.ndarray:
    """Spread one value per cell over the pixels that it owns."""
    return np.append(outside, values).astype(np.float32)[field.owner]


def draw_sample(rng: np.random.Generator, labels: Collection[int], size: int) -> dict[str, np.ndarray]:
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
        "green": green * per_cell(field, rng.uniform(0.8, 1.1, n_cells)),
        "blue": (0.6 + 0.4 * mitotic) * field.nucleus * (1 - 0.5 * field.nucleoli) * texture,
        "yellow": 0.8 * field.reticulum * per_cell(field, rng.uniform(0.7, 1.2, n_cells)),
    }
    grain = rng.standard_normal((size, size), dtype=np.float32)  # slow to draw, so all channels share one, rotated
    return {
        colour: camera(planes[colour] * texture, rng.uniform(0.8, 1.05), np.rot90(grain, turn))
        for turn, colour in enumerate(CHANNELS)
    }
