"""Every section of the page: the rules for a new one, and the lines of CONTRIBUTING.md that add one."""

import pandas as pd
import pytest

from common.artifacts.tables import write_csv
from common.report import build
from common.report.build import SECTIONS, collect, report_page
from common.report.page import Section
from common.report.reader import Work
from tests.contributing import example


@pytest.mark.parametrize("make", SECTIONS, ids=lambda make: make.__name__)
def test_a_section_has_title_lead_and_key_and_says_what_to_run_where_nothing_is_made(tmp_path, make):
    section = make(Work(tmp_path))
    assert isinstance(section, Section) and section.key == make.__name__
    assert section.title[0].isupper() and section.lead.endswith((".", "?"))
    assert section.blocks or "run: python 0" in section.note


def test_keys_are_different():
    assert len({make.__name__ for make in SECTIONS}) == len(SECTIONS)


def test_the_lines_of_contributing_add_a_section(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SECTIONS", list(SECTIONS))
    lost = {"Id": ["a", "b"], "part": "test", "Target": "", "place": [0, 1], "reason": "gone"}
    write_csv(tmp_path / "left_out.csv", pd.DataFrame(lost))
    exec(example("a report section"), {**vars(build)})
    *others, section = collect(Work(tmp_path))
    assert len(others) == len(SECTIONS) and section.key == "excluded" and not section.note
    assert section.blocks[0].frame.to_numpy().tolist() == [["test", 2]]
    assert 'id="excluded"' in report_page(Work(tmp_path))
