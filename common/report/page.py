"""A page of sections, each with blocks: facts, figures, tables and galleries of images; rendered to one HTML file.

The template escapes everything that comes from files; only the plots of `plots.py` are markup.
"""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, ParamSpec

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from common.errors import UserError


@dataclass(frozen=True)
class Facts:
    """A few figures in large type: name -> text."""

    items: dict[str, str]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Heading:
    """The title of the blocks that follow."""

    title: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Figure:
    """A plot; text : what to look for; wide : whether it takes the whole width."""

    title: str
    svg: Markup
    text: str
    wide: bool = False
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Picture:
    """A small image in a table's cell: data URI, and what it shows."""

    source: str
    alt: str


@dataclass(frozen=True)
class Table:
    """A table that is sorted by a click on a column.

    formats : column -> format of its numbers, or a function that formats them
    wide : whether it takes the whole width
    filtered : whether it has a field that leaves only the rows with what the reader types
    """

    title: str
    frame: pd.DataFrame
    text: str
    formats: dict = field(default_factory=dict)
    wide: bool = False
    filtered: bool = False
    kind: ClassVar[str] = "table"

    def rows(self) -> list[tuple[dict, ...]]:
        columns = [[cell(value, self.formats.get(name)) for value in self.frame[name]] for name in self.frame]
        return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class Card:
    """One or more images with lines of text below them, the first one in bold.

    images : (data URI, or '' if the image is not stored; what it shows)
    """

    images: list[tuple[str, str]]
    lines: list[str]
    Id: str = ""


@dataclass(frozen=True)
class Gallery:
    """Cards side by side; large : whether images are larger."""

    title: str
    cards: list[Card]
    text: str
    large: bool = False
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class More:
    """Blocks that are hidden until the reader opens them."""

    title: str
    blocks: list
    kind: ClassVar[str] = "more"


@dataclass(frozen=True)
class Section:
    """lead : its topic; note : why it is left out"""

    key: str
    title: str
    lead: str
    blocks: list
    note: str = ""


P = ParamSpec("P")


def section(title: str, lead: str) -> Callable[[Callable[P, list]], Callable[P, Section]]:
    """Turn a function that returns blocks into a section of the page.

    If an input of the blocks is missing, the section has a note that says what to run. Its key is the function's name.
    """

    def decorate(blocks: Callable[P, list]) -> Callable[P, Section]:
        @wraps(blocks)
        def make(*args: P.args, **kwargs: P.kwargs) -> Section:
            try:
                return Section(blocks.__name__, title, lead, blocks(*args, **kwargs))
            except UserError as error:
                return Section(blocks.__name__, title, lead, [], str(error))

        return make

    return decorate


def share(value: float) -> str:
    """Format a probability with two decimals, or with more if it would round to 0 or 1."""
    if 0 < value < 0.005:
        return f"{value:.1g}" if value >= 1e-9 else "< 1e-09"
    return f"{value:.2f}" if value <= 0.99 or value == 1 else f"{1 - float(f'{1 - value:.1g}'):.12g}"


def cell(value: Any, style: str | Callable[[Any], str] | None) -> dict:
    """Return a table cell's text and its sort key: numbers by value, intervals by their lower end.

    style : format of a number, or a function that formats it; None for the default
    """
    if isinstance(value, Picture):
        return {"text": "", "key": value.alt, "number": False, "picture": value}
    if value is None:
        return {"text": "–", "key": "", "number": True}
    if isinstance(value, (tuple, list)):
        return {"text": f"{value[0]:{style or '.2f'}}–{value[1]:{style or '.2f'}}", "key": value[0], "number": True}
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return {"text": str(value), "key": str(value), "number": False}
    if np.isnan(value):
        return {"text": "–", "key": "", "number": True}
    style = style or (",d" if isinstance(value, (int, np.integer)) else ".3f")
    return {"text": style(value) if callable(style) else f"{value:{style}}", "key": repr(float(value)), "number": True}


def data_uri(image: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def sha256(text: str) -> str:
    """Return the digest by which a page's security policy allows its own script and no other."""
    return base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


WORK_FOLDER = "Everything here comes from the files of the work folder and the files that its records name."


def render(title: str, lead: str, sections: list[Section], origin: str = WORK_FOLDER) -> str:
    """Return the whole page as HTML; origin : where everything on it comes from, a sentence."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = sha256
    return environment.get_template("report.html.jinja").render(
        title=title, lead=lead, sections=sections, origin=origin
    )
