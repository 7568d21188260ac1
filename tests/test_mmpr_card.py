"""The card of a data set: what its head says, and what its pictures show, read from the figures themselves.

pytest tests/test_mmpr_card.py
"""

import json

import pytest
import yaml
from test_mmpr_counts import pair

from internvl_mpo.mmpr.card import (
    COLOURS,
    _table,
    configurations,
    draw_lengths,
    draw_pictures,
    front_matter,
    statistics_text,
    write_card,
)
from internvl_mpo.mmpr.statistics import ReleaseStatistics, bin_start

SHARDS = [{"path": "data/geo170k/train-0.parquet", "source": "geo170k"}, {"path": "tiny/x", "source": "tiny"}]


@pytest.fixture
def figures(monkeypatch) -> list:
    """Figures that were drawn, still open."""
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plt.switch_backend("svg")  # as somebody may have set it, or a window on the screen
    yield drawn
    monkeypatch.undo()
    assert {type(figure.canvas).__name__ for figure in drawn} == {"FigureCanvasAgg"}
    plt.close("all")


@pytest.fixture
def statistics() -> ReleaseStatistics:
    """Geo170k has three pairs of one rule and one of another, AI2D two of the first."""
    made = ReleaseStatistics()
    for source, rule, count in (("geo170k", "correctness", 3), ("geo170k", "format", 1), ("ai2d", "correctness", 2)):
        for _ in range(count):
            made.add(pair(source=source, rule=rule), "one")
    made.add_image(32, 8, "PNG", 10)
    for _ in range(4):
        made.add_image(16, 64, "PNG", 10)
    return made


def test_the_head_of_a_card_is_what_the_hub_reads():
    head = yaml.safe_load(front_matter({"num_rows": 1500, "shards": SHARDS}, "MMPR für alle"))
    assert head == {
        "pretty_name": "MMPR für alle",
        "license": "mit",
        "language": ["en"],
        "task_categories": ["image-text-to-text", "visual-question-answering"],
        "tags": ["preference", "dpo", "mpo", "trl", "chain-of-thought", "multimodal"],
        "size_categories": ["1K<n<10K"],
        "configs": configurations(SHARDS),
    }
    text = front_matter({"num_rows": 1500, "shards": SHARDS}, "MMPR für alle")
    assert text.startswith("pretty_name: MMPR für alle\nlicense: mit\n")
    assert not text.endswith("\n")


def test_a_card_names_the_data_set_its_sources_and_its_pictures(tmp_path, statistics):
    manifest = {"num_rows": 6, "num_rejects": 0, "statistics": statistics.to_json(),
                "shards": [*SHARDS, SHARDS[0], {"path": "data/a_b/x", "source": "a b"}]}  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_card(tmp_path, name="me/pairs", title="My pairs")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\npretty_name: My pairs\n")
    head, body = text[4:].split("\n---\n", 1)
    assert yaml.safe_load(head)["configs"] == configurations(manifest["shards"])
    assert body.startswith("\n# My pairs\n\n6 preference pairs for vision-language models from 2 data sets:")
    assert 'load_dataset("me/pairs", "geo170k", split="train", streaming=True)' in body
    places = [body.index(part) for part in ("## Columns", "## Where it comes from", "## Statistics", "| **all** |")]
    assert places == sorted(places)
    for name in ("sources.png", "words.png", "image_sizes.png"):
        assert f"](pictures/{name})" in body
        assert (tmp_path / "pictures" / name).is_file()
    manifest["shards"] = SHARDS[1:]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_card(tmp_path)  # again, over what is there
    text = (tmp_path / "README.md").read_text()
    assert 'load_dataset("org/MMPR", "default", split="train", streaming=True)' in text
    assert text.startswith("---\npretty_name: MMPR\n") and "\n# MMPR\n" in text


def test_bars_are_the_pairs_of_a_source_rule_beside_rule(tmp_path, figures, statistics):
    drawn = draw_pictures(statistics, tmp_path)
    captions = {"sources.png": "Pairs by source and rule", "words.png": "Length in words",
                "image_sizes.png": "Sizes of the pictures"}  # fmt: skip
    assert dict(drawn) == captions
    assert len(figures) == len(drawn)
    (axis,) = figures[0].axes
    bars = [(round(bar.get_x()), round(bar.get_width())) for bar in axis.patches]
    assert bars == [(0, 2), (0, 3), (2, 0), (3, 1)], "correctness of both sources, then what follows it"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ai2d", "geo170k"], "the largest on top"
    assert (axis.get_xlabel(), axis.get_title()) == ("pairs", "6 pairs by source and rule")
    legend = axis.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["correctness", "format"]
    assert len({bar.get_facecolor() for bar in axis.patches}) == 2
    assert not legend.get_frame_on()
    assert [axis.spines[side].get_visible() for side in ("top", "right", "left", "bottom")] == [
        False,
        False,
        True,
        True,
    ]


def test_at_most_forty_sources_are_shown_each_with_room(tmp_path, figures):
    statistics = ReleaseStatistics()
    for number in range(45):
        for _ in range(1 + number // 5):
            statistics.add(pair(source=f"s{number:02d}"), "one")
    draw_pictures(statistics, tmp_path)
    (axis,) = figures[0].axes
    assert len(axis.patches) == 40
    assert figures[0].get_size_inches().tolist() == pytest.approx([8, 1.2 + 0.24 * 40])
    assert min(bar.get_width() for bar in axis.patches) == 2


def test_sizes_of_pictures_are_points_as_large_as_they_are_many(tmp_path, figures, statistics):
    draw_pictures(statistics, tmp_path)
    axis, _ = figures[2].axes
    (points,) = axis.collections
    assert points.get_offsets().tolist() == [[32, 8], [16, 64]]
    assert points.get_sizes().tolist() == pytest.approx([20 + 180 / 4, 200])
    assert points.get_array().tolist() == [1, 4]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("width in pixels", "height in pixels")
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_title() == "Sizes of 5 pictures"
    assert figures[2].axes[1].get_ylabel() == "pictures"
    assert [axis.xaxis.get_major_formatter()(value) for value in (1, 1024)] == ["1", "1024"]


@pytest.mark.parametrize("kind", ["words", "tokens"])
def test_lengths_are_steps_from_the_shortest_text_to_the_longest(tmp_path, figures, kind):
    histograms = {("a", "r", "question"): {2: 3, 4: 1}, ("b", "r", "question"): {2: 1}, ("a", "r", "chosen"): {-1: 2}}
    draw_lengths(histograms, kind, tmp_path / "a.png")
    (axis,) = figures[0].axes
    question, chosen = axis.patches
    values, edges, _ = question.get_data()
    assert (values.tolist(), edges.tolist()) == ([4, 0, 1], [bin_start(number) for number in (2, 3, 4, 5)])
    values, edges, _ = chosen.get_data()
    assert (values.tolist(), edges.tolist()) == ([2], [0.7, 1.0])
    assert [part.get_label() for part in axis.patches] == ["question", "chosen"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == (f"{kind} per text", "texts")
    assert axis.get_title() == f"Length of questions and responses in {kind}"
    assert [side for side, spine in axis.spines.items() if spine.get_visible()] == ["left", "bottom"]
    assert not axis.get_legend().get_frame_on()
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "linear")
    draw_lengths({("tokens", "rejected"): {0: 1}, ("chosen",): {0: 1}}, kind, tmp_path / "b.png")
    styles = {part.get_label(): part.get_linestyle() for part in figures[1].axes[0].patches}
    assert styles == {"chosen": "-", "rejected": "--"}
    from matplotlib.colors import to_hex

    colours = {part.get_label(): to_hex(part.get_edgecolor()) for part in figures[1].axes[0].patches}
    assert colours == {side: COLOURS[side] for side in styles}


def test_a_picture_of_a_card_does_not_say_when_and_with_what_it_was_made(tmp_path, statistics):
    draw_pictures(statistics, tmp_path)
    assert all(b"Software" not in path.read_bytes() for path in tmp_path.iterdir())


def test_each_picture_of_a_card_shows_what_there_is(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    fitted, fit = [], Figure.tight_layout
    monkeypatch.setattr(Figure, "tight_layout", lambda figure: fitted.append(figure) or fit(figure))
    statistics = ReleaseStatistics()
    statistics.add(pair(), "one")
    assert [name for name, _ in draw_pictures(statistics, tmp_path)] == ["sources.png", "words.png"]
    statistics.add(pair(), "one", count_tokens=len)
    statistics.add_image(4, 8, "PNG", 10)
    names = ["sources.png", "words.png", "tokens.png", "image_sizes.png"]
    assert [name for name, _ in draw_pictures(statistics, tmp_path)] == names
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names)
    assert len(fitted) == 3  # no long name of a source is cut off


def test_the_statistics_of_a_card():
    statistics = ReleaseStatistics()
    for rule in ("correctness", "format", "correctness"):
        statistics.add(pair(rule=rule), "one", count_tokens=len)
    for format in ("JPEG", "PNG", "PNG"):
        statistics.add_image(4, 8, format, 1_000_000)
    text = statistics_text(statistics, {"num_rejects": 1200}, [("a.png", "A")])
    assert (
        text
        == """\
## Statistics

Words are counted between spaces; a Chinese or Japanese character counts as one.

| source | family | pairs | correctness | format |
|---|---|---|---|---|
| geo170k | mathematics | 3 | 2 | 1 |
| **all** |  | 3 | 2 | 1 |

Length in words, and how chosen compares with rejected (geometric mean of the ratio; share of longer ones):

| rule | question | chosen | rejected | chosen / rejected | chosen longer |
|---|---|---|---|---|---|
| correctness | 3.0 | 4.0 | 2.0 | 2.00 | 100% |
| format | 3.0 | 4.0 | 2.0 | 2.00 | 100% |

Mean tokens over a sample of 3 pairs: question 14.0, chosen 18.0, rejected 7.0.

Pictures per pair: 1: 3.
Distinct pictures (counted per shard): 3, 3.0 MB (PNG 2, JPEG 1).

1,200 lines of the release could not be converted.

![A](pictures/a.png)
"""
    )
    empty = statistics_text(ReleaseStatistics(), {"num_rejects": 0}, [])
    assert not any(word in empty for word in ("Mean tokens", "Distinct", "could not", "!["))
    assert _table(["a", "b"], [[1234, "x"]]) == ["| a | b |", "|---|---|", "| 1,234 | x |"]
