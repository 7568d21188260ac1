"""The report of a check, as text, as numbers and as a page: every cell of a small one.

pytest tests/test_mmpr_report.py
"""

import base64
import math
from pathlib import Path

import pytest
from test_mmpr_counts import pair

from internvl_mpo.mmpr import check_report as module
from internvl_mpo.mmpr.check_report import report_json, text_table, write_report
from internvl_mpo.mmpr.contamination import BenchmarkIndex
from internvl_mpo.mmpr.differences import LikelihoodGap, compare
from internvl_mpo.mmpr.findings import Finding, Report

ONE, OTHER = "geo170k_pairs_vqa_correctness_rules", "b"


@pytest.fixture
def report() -> Report:
    """Two subsets; seven broken pictures of which two are shown, a file of no subset, a subset with findings alone."""
    made = Report("folder/raw")
    made.counts.update({OTHER: 1, ONE: 1200})
    made.expected = {ONE: 1300}
    made.kinds.update({("picture", ONE): 6, ("picture", "gone"): 1, ("language", ONE): 2, ("file", ""): 1})
    made.examples["picture"] += [Finding("picture", f"a.jsonl:{n}", ONE, f"reason {n}") for n in (2, 3)]
    made.examples["language"].append(Finding("language", "a.jsonl:9", ONE, "is French"))
    made.examples["file"].append(Finding("file", "x.zip", "", "is half"))
    for source, chosen in (("geo170k", "one two three four"), ("ai2d", "one")):
        made.statistics.add(pair(source=source, chosen=chosen), ONE)
        made.differences.add((source, "correctness"), compare(chosen, "one two"))
    made.statistics.add_image(4, 4, "PNG", 10)
    return made


def test_the_text_is_a_table_of_subsets_then_lengths_differences_and_each_kind_with_its_first_examples(report):
    lines = text_table(report).split("\n")
    width = len(ONE)
    assert lines[0] == f"{'subset':<{width}}       rows  picture     file  language"
    assert lines[1:5] == [
        f"{OTHER:<{width}}          1        -        -         -",
        f"{ONE}      1,200        6        -         2",
        f"{'gone':<{width}}          0        1        -         -",
        f"{'total':<{width}}      1,201        7        1         2",
    ]
    geo, ai2d = "geo170k, correctness", "ai2d, correctness"
    assert lines[5:9] == [
        "",
        "words of chosen and rejected, mean ratio, how often chosen is longer:",
        f"  {ai2d:<{width}}       1.0      2.0   0.50    0%",
        f"  {geo:<{width}}       4.0      2.0   2.00  100%",
    ]
    assert lines[9:11] == [
        "",
        "how the responses of a pair differ: chosen words before the first that differs, words in common, "
        "pairs that differ in one word:",
    ]
    cells = dict(module.difference_rows(report))
    assert list(cells) == [ai2d, geo]
    assert lines[11:13] == [f"  {name:<{width}}  " + " ".join(f"{cell:>8}" for cell in cells[name]) for name in cells]
    assert lines[13:] == [
        "",
        "error: picture, 7 (missing, unreadable, cut off, or far too large)",
        "  a.jsonl:2: reason 2",
        "  a.jsonl:3: reason 3",
        "",
        "error: file, 1 (a Parquet file is not what the manifest says, or a part of an archive is missing)",
        "  x.zip: is half",
        "",
        "warning: language, 2 (the chosen response is in another language than the question)",
        "  a.jsonl:9: is French",
    ]
    report.index = BenchmarkIndex(examples=[("pope", "1")])
    text = "of 1 questions 0 found by picture and words, 0 by picture, 0 by words"
    assert text_table(report).split("\n") == [*lines, "", f"pope: {text}"]
    assert text_table(Report("x")).split("\n")[:2] == ["subset       rows", "total           0"]


def test_the_numbers_are_those_of_the_report(report):
    means = {key: report.differences.mean(key)._asdict() for key in report.differences.sums}
    found = report_json(report)
    assert found == {
        "data": "folder/raw", "rows": {OTHER: 1, ONE: 1200}, "errors": 8, "warnings": 2, "model": None,
        "findings": [
            {"kind": "picture", "subset": ONE, "number": 6}, {"kind": "picture", "subset": "gone", "number": 1},
            {"kind": "language", "subset": ONE, "number": 2}, {"kind": "file", "subset": "", "number": 1},
        ],
        "differences": [
            {"source": source, "rule": "correctness", **means[source, "correctness"], "likelihood": None}
            for source in ("ai2d", "geo170k")
        ],
    }  # fmt: skip
    report.model, report.gaps["ai2d", "correctness"] = "me/model", LikelihoodGap(1200, -1.5, -2.0, 0.75)
    found = report_json(report)
    assert found["model"] == "me/model"
    gap = {"pairs": 1200, "chosen": -1.5, "rejected": -2.0, "chosen_likelier": 0.75, "gap": 0.5}
    assert [row["likelihood"] for row in found["differences"]] == [gap, None]


def given_to_page(report: Report, monkeypatch, tmp_path: Path) -> dict:
    given = {}
    monkeypatch.setattr(module, "render_page", lambda template, **more: given.update(more, template=template) or "page")
    write_report(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "page"
    return given


def test_the_page_is_given_every_cell_of_its_tables(report, monkeypatch, tmp_path):
    page = given_to_page(report, monkeypatch, tmp_path)
    simple = {key: page[key] for key in ("template", "name", "verdict", "said", "num_rows", "num_pictures", "kinds")}
    assert simple == {
        "template": "mmpr/check_report.html", "name": "raw", "verdict": "error", "said": "8 errors, 2 warnings.",
        "num_rows": 1201, "num_pictures": 1, "kinds": ["picture", "file", "language"],
    }  # fmt: skip
    nothing = ("", "")
    rows = {row["source"]: row for row in page["subsets"]}
    assert list(rows) == [OTHER, "geo170k", "gone", "all"]
    assert rows["geo170k"] == {
        "source": "geo170k", "rule": "correctness", "num_rows": "1,200", "expected": "1,300",
        "cells": [("error", "6"), nothing, ("warning", "2")],
    }  # fmt: skip
    assert (rows[OTHER]["num_rows"], rows[OTHER]["expected"], rows[OTHER]["cells"]) == ("1", "", [nothing] * 3)
    assert rows["gone"]["cells"] == [("error", "1"), nothing, nothing]
    assert rows["all"] == {
        "source": "all", "rule": "", "num_rows": "1,201", "expected": "",
        "cells": [("error", "7"), ("error", "1"), ("warning", "2")],
    }  # fmt: skip
    assert [(name, width, is_less) for name, _, width, is_less in page["lengths"]] == [
        ("ai2d, correctness", "5.0", True), ("geo170k, correctness", "5.0", False)
    ]  # fmt: skip
    assert page["lengths"][1][1] == ["3.0", "4.0", "2.0", "2.00", "100%"]
    assert [(one["kind"], one["severity"], one["number"], one["more"]) for one in page["findings"]] == [
        ("picture", "error", "7", "5"), ("file", "error", "1", ""), ("language", "warning", "2", "1")
    ]  # fmt: skip
    assert page["findings"][0]["examples"] == report.examples["picture"]
    assert page["findings"][0]["meaning"] == "missing, unreadable, cut off, or far too large"
    assert page["difference_columns"] == module.difference_columns(report)
    assert page["difference_rows"] == module.difference_rows(report)
    assert page["plot"].startswith("data:image/png;base64,iVBOR")  # a PNG that holds something
    assert (page["contamination"], page["cards"]) == (None, [])
    assert page["asked"] == "With --model the table also says how likely a model finds both."


def test_the_verdict_is_that_of_the_worst_finding(report, monkeypatch, tmp_path):
    report.kinds.clear()
    report.statistics.lengths.clear()
    page = given_to_page(report, monkeypatch, tmp_path)
    assert (page["verdict"], page["said"], page["findings"]) == ("clean", "No errors and no warnings.", [])
    assert page["plot"] == ""
    report.kinds["language", ONE] = 1
    page = given_to_page(report, monkeypatch, tmp_path)
    assert (page["verdict"], page["said"]) == ("warning", "0 errors, 1 warnings.")


def test_pictures_that_look_like_a_benchmarks_stand_beside_its_question(report, monkeypatch, tmp_path):
    report.index = BenchmarkIndex(examples=[("pope", "1"), ("crpe", "7")], questions=["first?", "x" * 300])
    report.shown = [(1, "a.jsonl:3", b"jpeg")]
    report.model = "me/model"
    page = given_to_page(report, monkeypatch, tmp_path)
    assert page["contamination"] == module.contamination_rows(report)
    picture = "data:image/jpeg;base64," + base64.b64encode(b"jpeg").decode()
    card = {"picture": picture, "where": "a.jsonl:3", "benchmark": "crpe", "id": "7", "question": "x" * 200}
    assert page["cards"] == [card]
    assert page["asked"].startswith("Log-probs are those of me/model, over a sample;")
    assert "chosen (nats a token)" in page["difference_columns"]


@pytest.mark.parametrize(("ratio", "width"), [("2.00", 5.0), ("0.50", 5.0), ("1.00", 0.0), ("99.00", 15), ("0.00", 15)])
def test_a_bar_is_five_rem_for_each_doubling_and_never_wider_than_the_page(report, monkeypatch, ratio, width):
    monkeypatch.setattr(module, "length_rows", lambda report: [("x", ["", "", "", ratio, ""])])
    ((name, _, found, is_less),) = module._length_bars(report)
    assert (name, float(found), is_less) == ("x", width, float(ratio) < 1)
    assert math.isclose(float(found), width)


def test_the_page_itself_shows_what_it_is_given(report, tmp_path):
    report.examples["picture"][0] = report.examples["picture"][0]._replace(detail="<b>hostile</b>")
    write_report(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    parts = ["Check of raw", "8 errors, 2 warnings.", "1,201 rows in 2 subsets,\n1 pictures", "1,300"]
    parts += ["&lt;b&gt;hostile", "and 5 more in the rejects file", '<td class="error">7', "geo170k, correctness"]
    assert [part for part in parts if part not in text] == []
    assert "Benchmarks" not in text
    assert "<b>hostile" not in text
