import re

import numpy as np
import pandas as pd
import pytest

from common.report.page import Card, Facts, Figure, Gallery, More, Note, Section, Table, cell, render, sha256, share

ATTACK = '"><script>alert(1)</script>'


@pytest.mark.parametrize(
    ("value", "style", "text", "key"),
    [
        (12885, None, "12,885", "12885.0"),
        (0.12345, None, "0.123", "0.12345"),
        (0.12345, ".1f", "0.1", "0.12345"),
        (np.float32("nan"), None, "–", ""),
        (None, None, "–", ""),
        (0.001, share, "0.001", "0.001"),
        ((0.5, 0.75), None, "0.50–0.75", "0.5"),
        ("Cytosol", None, "Cytosol", "Cytosol"),
    ],
)
def test_cells_show_rounded_numbers_and_sort_by_whole_ones(value, style, text, key):
    assert cell(value, style)["text"] == text and str(cell(value, style)["key"]) == key


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (4e-31, "< 1e-09"),
        (1.12e-7, "1e-07"),
        (0.0049, "0.005"),
        (0.005, "0.01"),
        (0.123, "0.12"),
        (0.99, "0.99"),
        (0.9994296, "0.9994"),
        (0.996, "0.996"),
        (1, "1.00"),
    ],
)
def test_a_probability_is_called_0_or_1_only_where_it_is(value, text):
    assert share(value) == text


def test_whatever_the_text_it_is_never_markup():
    blocks = [
        Facts({ATTACK: ATTACK}),
        Note(ATTACK),
        Table(ATTACK, pd.DataFrame({ATTACK: [ATTACK]}), ATTACK),
        Gallery(ATTACK, [Card([("", ATTACK), (ATTACK, ATTACK)], [ATTACK, ATTACK], ATTACK)], ATTACK),
        More(ATTACK, [Figure(ATTACK, ATTACK, ATTACK)]),
    ]
    page = render(ATTACK, ATTACK, [Section(ATTACK, ATTACK, ATTACK, blocks, ATTACK)])
    assert page.count("<script>") == 1 and "alert(1)</script>" not in page and page.count("&lt;script&gt;") > 15


def test_only_the_pages_own_script_may_run_and_nothing_may_be_fetched():
    page = render("title", "", [Section("a", "A", "", [])])
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{sha256(script)}'" in page
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
