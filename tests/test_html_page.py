"""The page of all reports: nothing a model or a data set says becomes HTML, and nothing is fetched."""

import re
from pathlib import Path

import jinja2
import pytest

from internvl_mpo.html_page import embedded, render_page

PACKAGE = Path(__file__).resolve().parents[1] / "internvl_mpo"
PAGES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("*/*report.html"))
ODD = "<script>alert('1')</script> \"&amp; \ud83d"


def page(**values) -> str:
    nothing = {"names": ["run"], "benchmarks": [], "states": ["all"], "questions": []}
    return render_page("evaluation/report.html", **{**nothing, **values})


def test_markup_in_values_is_shown_and_half_a_character_can_be_written():
    bar = {"kind": ODD, "label": ODD, "width": ODD, "shown": ODD, "note": ODD}
    text = page(names=[ODD], benchmarks=[{"title": ODD, "bars": [bar], "protocol": None, "breakdowns": [(ODD, [])]}])
    text.encode("utf-8")
    assert text.count("<script>") == 1, "the page's own script only"
    assert text.count("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &#34;&amp;amp; ?") == 9


def test_a_value_that_is_missing_is_an_error_not_a_gap():
    with pytest.raises(jinja2.UndefinedError, match="title"):
        page(benchmarks=[{"bars": []}])


@pytest.mark.parametrize("name", PAGES)
def test_a_template_is_one_of_the_family_and_fetches_nothing(name):
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert text.startswith('{% extends "page.html" %}\n')
    assert not re.search(r"https?:|@import|url\(|\|\s*safe", text + (PACKAGE / "page.html").read_text(encoding="utf-8"))


def test_there_are_three_reports():
    assert PAGES == ["evaluation/report.html", "mini/report.html", "mmpr/check_report.html"]


def test_pictures_are_embedded():
    assert embedded(b"\x89PNG", "png") == "data:image/png;base64,iVBORw=="
