import re
from xml.etree import ElementTree

import numpy as np
import pytest

from common.report import plots

TEXT = "{http://www.w3.org/2000/svg}text"


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(TEXT)]


def test_the_svg_takes_size_font_and_colours_from_the_page():
    svg = plots.bars("a", ["1", "2"], [3, 1234], "labels", "samples")
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") == "0 0 360 172.8" and root.get("width") is None and root.get("height") is None
    assert (
        not any(colour in svg for colour in plots.STAND_INS.values())
        and "font-family" not in svg
        and "<style" not in svg
    )
    assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(plots.STAND_INS)
    assert {"labels", "samples", "3", "1,234"} <= set(texts(svg))


def test_what_is_said_keeps_its_digits_and_is_not_markup():
    name = "0.0001234 <script> $x$ & co"
    svg = plots.dots("a", [name], {"weight": np.array([1.0])}, name)
    assert texts(svg).count(name) == 2 and "<script>" not in svg


def test_parts_of_two_plots_never_share_a_name():
    one, other = (set(re.findall(r' id="([^"]+)"', plots.bars(name, ["x"], [1], "x", "y"))) for name in "ab")
    assert one and other and not one & other


def test_the_same_plot_is_the_same_text():
    series = {"fold 0": (np.arange(1, 4), [3, 2, 1])}
    one, other = (plots.lines("a", series, "epoch", "loss", verticals=[2.5]) for _ in range(2))
    assert one == other and {"1", "2", "3"} <= set(texts(one))


@pytest.mark.parametrize(("value", "text"), [(0.00001, "1e-05"), (0.002, "0.002"), (20.0, "20"), (12885, "12,885")])
def test_ticks_are_plain(value, text):
    assert plots.plain(value) == text


def test_a_wide_range_is_logarithmic_and_says_so():
    wide = plots.dots("a", ["x", "y", "z"], {"n": np.array([12885.0, 11, np.nan])}, "samples", log=True)
    narrow = plots.dots("a", ["x", "y"], {"n": np.array([2.0, 3])}, "samples", log=True)
    assert {"samples, log scale", "100", "10,000"} <= set(texts(wide)) and "samples" in texts(narrow)
