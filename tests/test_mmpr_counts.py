"""Counts of a release, copies in it, and how often a row is seen: small numbers that can be checked by hand."""

import io
import math
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr import contamination, copies, restore
from internvl_mpo.mmpr.card import configurations, length_row, size_category
from internvl_mpo.mmpr.check import MAX_SHOWN, _Looker, check
from internvl_mpo.mmpr.check_report import contamination_rows, difference_rows, report_json, text_table
from internvl_mpo.mmpr.contamination import BenchmarkIndex, word_runs
from internvl_mpo.mmpr.copies import copy_groups, find_copies, similarity_hash
from internvl_mpo.mmpr.differences import LikelihoodGap, compare
from internvl_mpo.mmpr.findings import Finding, Part, Report
from internvl_mpo.mmpr.manifest import safe_name
from internvl_mpo.mmpr.pairs import mixture_table, repeats
from internvl_mpo.mmpr.statistics import FAMILIES, ReleaseStatistics, bin_of, bin_start, count_words, family_of
from internvl_mpo.records import PreferencePair


def pair(source="geo170k", rule="correctness", **changes) -> PreferencePair:
    fields = {"images": ("a.png",), "question": "How many cats?", "chosen": "one two three four", "rejected": "one two"}
    return PreferencePair(id="x", source=source, rule=rule, **{**fields, **changes})


# -------------------------------------------------------------------------------------------------------------- copies


def part(name: str, rows: list[tuple[int, int, int, int]], first: int = 1) -> Part:
    """A part of rows given as hashes of content, id, prompt and responses."""
    made = Part(name, subsets=["s"])
    for number, row in enumerate(rows, start=first):
        for key, value in zip(("content", "id", "prompt", "near"), row, strict=True):
            made.rows[key].append(value)
        made.numbers.append(number)
        made.members.append(0)
    return made


def test_a_near_copy_differs_in_eight_bits_of_sixty_four_and_no_more():
    near = (1 << 40) + 12345
    for bits, is_near in ((8, True), (9, False)):
        rows = [(1, 1, 7, near), (2, 2, 7, near ^ ((1 << bits) - 1))]
        found = list(find_copies([part("a.jsonl", rows)]))
        assert found == ([Finding("near copy", "a.jsonl:2", "s", "nearly a.jsonl:1")] if is_near else [])
    assert list(find_copies([part("a", [(1, 1, 7, near), (2, 2, 8, near)])])) == []  # of another prompt
    assert list(find_copies([part("a", [(1, 1, 7, 0), (2, 2, 7, 0)])])) == []  # both too short to say
    assert list(find_copies([])) == []


def test_a_copy_names_the_row_that_came_first_over_all_parts():
    first, second = part("a.jsonl", [(1, 1, 1, 0), (2, 2, 2, 0)]), part("b.parquet#0", [(1, 1, 1, 0), (3, 2, 3, 0)], 5)
    assert list(find_copies([first, second])) == [
        Finding("same row", "b.parquet:row 5", "s", "equals a.jsonl:1"),
        Finding("same id", "b.parquet:row 6", "s", "its id is also that of a.jsonl:2"),
    ]
    third = part("c", [(9, 9, 4, 7), (9, 9, 4, 7), (8, 8, 4, 7)])  # the second is a copy, so no near copy of its own
    assert [(one.kind, one.where) for one in find_copies([third])] == [("same row", "c:2"), ("near copy", "c:3")]


def test_groups_of_equal_values_keep_the_order_of_rows():
    values = np.array([5, 0, 5, 7, 0, 5, 2**64 - 1], np.uint64)
    assert [group.tolist() for group in copy_groups(values)] == [[1, 4], [0, 2, 5]]
    assert list(copy_groups(np.zeros(0, np.uint64))) == []
    assert [group.tolist() for group in copy_groups(np.zeros(2, np.uint64))] == [[0, 1]]


def test_forty_words_of_both_responses_are_enough_for_a_similarity():
    chosen = " ".join(f"word{i}" for i in range(20))
    rejected = " ".join(f"other{i}" for i in range(19))
    assert copies.MIN_NEAR_WORDS == 40 and similarity_hash(chosen, rejected) != 0  # the mark between them counts
    assert similarity_hash(chosen, rejected.rsplit(" ", 1)[0]) == 0
    assert similarity_hash(chosen.upper(), rejected) == similarity_hash(chosen, rejected)
    assert similarity_hash(rejected, chosen) != similarity_hash(chosen, rejected)


@pytest.mark.parametrize("count", [60, 65])  # of the 90 runs of 65 words half speak for five of the bits, half against
def test_the_similarity_hash_does_not_change_from_version_to_version(count):
    text = " ".join(str(i * i) for i in range(count))
    words = [*text.split(), "|", *text[:90].split()]
    import zlib

    counts = [0] * 64
    runs = list(zip(words, words[1:], words[2:], strict=False))
    mask = 2**64 - 1
    for first, second, third in runs:
        a, b, c = (zlib.crc32(word.encode()) for word in (first, second, third))
        mixed = (a * 0x9E3779B97F4A7C15 & mask) ^ (b * 0xC2B2AE3D27D4EB4F & mask) ^ c
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
        content = (mixed ^ mixed >> 31).to_bytes(8, "little")
        for place in range(64):
            counts[place] += content[place // 8] >> (7 - place % 8) & 1
    bits = "".join(str(int(2 * count > len(runs))) for count in counts)
    wanted = int.from_bytes(int(bits, 2).to_bytes(8, "big"), "little")
    assert similarity_hash(text, text[:90]) == wanted


# ---------------------------------------------------------------------------------------------------------- statistics


def test_a_bin_is_half_a_doubling():
    assert [bin_of(value) for value in (0, 1, 2, 3, 4, 5, 6, 8, 1024)] == [-1, 0, 2, 3, 4, 4, 5, 6, 20]
    assert [bin_start(number) for number in (-1, 0, 2, 4)] == [0, 1, 2, 4] and bin_start(1) == pytest.approx(2**0.5)
    for value in range(1, 200):
        assert bin_start(bin_of(value)) <= value + 1e-6 < bin_start(bin_of(value) + 1) + 1e-5


def test_words_of_chinese_and_japanese_are_characters():
    assert [count_words(text) for text in ("", "a b", "图片里 two", "かな", "a图b")] == [0, 2, 4, 2, 3]


def test_the_sources_of_the_releases_belong_to_the_groups_of_the_paper():
    names = {
        "general_vqa": "VQAv2 GQA OKVQA IconQA_train TallyQA vsr cocorem nlvr2 koniq inat coco",
        "science": "AI2D ScienceQA M3CoT", "chart": "ChartQA FigureQA MapQA DVQA TabMWP PlotQA",
        "mathematics": "CLEVR_math super_CLEVR Geo170k GeomVerse UniGeo MathV360K MAVIS",
        "ocr": "OCRVQA InfographicsVQA InfoVQA SROIE TextVQA STVQA", "document": "DocVQA", "preference": "RLAIF-V",
    }  # fmt: skip
    found = {family: {family_of(name) for name in sources.split()} for family, sources in names.items()}
    assert found == {family: {family} for family in names}
    assert list(FAMILIES) == list(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_source_belongs_to_its_group(family):
    for name in FAMILIES[family]:
        assert family_of(name.upper() + "_train_5k") == family or name.startswith(("coco", "clevr", "geo"))
    assert family_of("x" + FAMILIES[family][0]) == family_of("") == "other"


def test_sums_of_a_pair_are_its_words():
    statistics = ReleaseStatistics()
    statistics.add(pair(), "one", count_tokens=len)
    statistics.add(pair(chosen="a", rejected="b", images=()), "two")
    key = ("geo170k", "correctness")
    assert statistics.rows == {key: 2} and statistics.subsets == {"one": 1, "two": 1}
    assert statistics.images_per_row == {1: 1, 0: 1}
    assert statistics.sums[*key, "chosen"] == {"texts": 2, "words": 5}
    assert statistics.sums[*key, "rejected"] == {"texts": 2, "words": 3}
    assert statistics.sums[*key, "question"] == {"texts": 2, "words": 6}
    assert statistics.sums[*key, "pair"] == {"longer": 1, "log_ratio": math.log(2)}
    assert statistics.sums["tokens", "chosen"] == {"texts": 1, "tokens": 18}
    assert statistics.tokens[("chosen",)] == {bin_of(18): 1}
    assert statistics.lengths[*key, "chosen"] == {bin_of(4): 1, bin_of(1): 1}
    statistics.add_image(4, 8, "PNG", 100)
    statistics.add_image(8, 4, "PNG", 50)
    assert statistics.image_sides == {(4, 6): 1, (6, 4): 1}
    assert (statistics.image_formats, statistics.image_bytes) == ({"PNG": 2}, 150)
    read = ReleaseStatistics.from_json(statistics.to_json())
    assert read == statistics
    read.merge(statistics)
    assert read.image_bytes == 300 and read.rows == {key: 4} and read.sums[*key, "chosen"] == {"texts": 4, "words": 10}
    assert read.tokens[("chosen",)] == {bin_of(18): 2} and read.image_sides == {(4, 6): 2, (6, 4): 2}
    assert length_row(statistics) == ["3.0", "2.5", "1.5", "1.41", "50%"]
    assert length_row(statistics, source="other") == ["0.0", "0.0", "0.0", "1.00", "0%"]
    assert length_row(statistics, rule="format") == length_row(ReleaseStatistics())
    assert length_row(statistics, source="geo170k", rule="correctness") == length_row(statistics)


def test_how_two_responses_differ():
    assert compare("a b c", "a b c") == (1.0, 1.0, True)
    assert compare("a b c d", "a x c d") == (0.25, 0.75, True)
    assert compare("a b c d", "a x y d") == (0.25, 0.5, False)
    assert compare("a b c", "a b c d") == (1.0, 6 / 7, True)
    assert compare("a b c", "a b c d e")[2] is False
    assert compare("", "") == (0.0, 0.0, True)
    assert compare("a a b", "a b b")[1] == pytest.approx(4 / 6)
    assert LikelihoodGap(1, -0.5, -0.75, 1.0).gap == 0.25


# ------------------------------------------------------------------------------------------------------- how often seen


def test_a_subset_is_seen_as_often_as_its_repeat_time_says():
    members = np.array([0] * 10 + [1] * 4 + [2] * 4)
    counts = repeats([("a", 2.5), ("b", 0.5), ("c", 0.0)], members, seed=1)
    assert counts[:10].sum() == 25 and set(counts[:10].tolist()) == {2, 3}
    assert counts[10:14].sum() == 2 and set(counts[10:14].tolist()) == {0, 1}
    assert counts[14:].tolist() == [0] * 4


def test_the_seed_and_the_name_decide_which_rows_are_seen_once_more():
    members = np.zeros(40, int)
    drawn = {tuple(repeats([(name, 1.5)], members, seed).tolist()) for name in "ab" for seed in range(5)}
    assert len(drawn) == 10
    assert repeats([("a", 1.5)], members, 3).tolist() == repeats([("a", 1.5)], members, 3).tolist()
    # another subset in front moves nothing
    both = repeats([("z", 1), ("a", 1.5)], np.array([0] * 7 + [1] * 40), 3)
    assert both[7:].tolist() == repeats([("a", 1.5)], members, 3).tolist()


def test_square_roots_share_out_the_same_total():
    members = np.array([1] * 90 + [0] * 10)
    counts = repeats([("few", 1.0), ("many", 1.0)], members, 0, "sqrt")
    assert counts.sum() == 100 and counts[:90].sum() == 75 and counts[90:].sum() == 25
    counts = repeats([("a", 1.0), ("b", 1.0), ("c", 1.0)], np.array([0, 1, 1, 2, 2, 2]), 0, "sqrt")
    assert counts.sum() == 6  # what rounding leaves goes to the largest remainders
    assert [counts[:1].sum(), counts[1:3].sum(), counts[3:].sum()] == [1, 2, 3]
    assert repeats([("a", 0.0)], np.zeros(3, int), 0, "sqrt").tolist() == [0, 0, 0]


def test_the_table_of_the_mixture():
    subsets = [("a", 2.0), ("b", 0.5), ("a", 1.0), ("unused", 1.0)]
    members, counts, costs = np.array([0, 1, 1, 2]), np.array([2, 1, 0, 1]), np.array([100, 50, 60, 30])
    lines = [line.split() for line in mixture_table(subsets, members, counts, costs).splitlines()]
    assert lines == [
        ["subset", "rows", "repeat", "seen", "share", "tokens", "each"],
        ["a", "2", "mixed", "3", "75.0%", "77"],
        ["b", "2", "0.5", "1", "25.0%", "50"],
        ["all", "4", "4", "100.0%", "70"],
    ]
    empty = mixture_table(subsets, members, np.zeros(4, int), costs).splitlines()
    assert empty[1].split() == ["a", "2", "mixed", "0", "0.0%", "0"] and empty[-1].split()[-1] == "0"
    long = mixture_table([("n" * 70, 1.0)], np.zeros(1, int), np.ones(1, int), np.ones(1, int)).splitlines()
    assert long[0].startswith("subset" + " " * 54 + "  ")


# ------------------------------------------------------------------------------------------------------ card and report


def test_a_configuration_for_each_source_family_and_the_tiny_one():
    shards = [{"path": f"data/{name}/train-0.parquet", "source": name} for name in ("geo170k", "a b", "docvqa", "tiny")]
    made = {one["config_name"]: one["data_files"][0]["path"] for one in configurations(shards)}
    assert made["default"] == "data/*/train-*.parquet" and made["geo170k"] == "data/geo170k/train-*.parquet"
    assert made["mathematics"] == ["data/geo170k/train-*.parquet"] and made["document"] == [
        "data/docvqa/train-*.parquet"
    ]
    assert made["other"] == ["data/a_b/train-*.parquet", "data/tiny/train-*.parquet"]
    assert made["a_b"] == "data/a_b/train-*.parquet" and "tiny" not in made
    made = configurations([*shards[:1], {"path": "tiny/train-0.parquet", "source": "tiny"}])
    assert [one["config_name"] for one in made] == ["default", "mathematics", "geo170k", "tiny"]
    assert made[-1]["data_files"] == [{"split": "train", "path": "tiny/train-*.parquet"}]
    assert [one.get("default") for one in made] == [True, None, None, None]
    assert [one["config_name"] for one in configurations([{"path": "data/other/x", "source": "other"}])] == [
        *("default", "other")
    ]


@pytest.mark.parametrize(
    ("num_rows", "name"),
    [
        *((0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9_999, "1K<n<10K"), (10_000, "10K<n<100K")),
        *((999_999, "100K<n<1M"), (10**6, "1M<n<10M"), (10**7, "10M<n<100M"), (10**9, "10M<n<100M")),
    ],
)
def test_the_size_of_a_data_set_has_the_hubs_name(num_rows, name):
    assert size_category(num_rows) == name


def test_a_source_becomes_the_name_of_a_folder():
    assert [safe_name(text) for text in ("a b/c", "..x", "_.+-é1", "", "...")] == [
        *("a_b_c", "x", "_.+-é1", "unnamed", "unnamed")
    ]


def report() -> Report:
    made = Report("raw", counts={"s": 3, "t": 1})
    made.counts = type(made.kinds)({"s": 3, "t": 1})
    made.kinds["picture", "s"], made.kinds["language", "t"], made.kinds["file", ""] = 2, 1, 1
    made.examples["picture"].append(Finding("picture", "a.jsonl:2", "s", "is empty"))
    made.statistics.add(pair(), "s")
    made.differences.add(("geo170k", "correctness"), compare("a b", "a c"))
    return made


def test_the_table_of_a_check_shows_what_was_found_by_subset():
    made = report()
    lines = text_table(made).splitlines()
    assert lines[0].split() == ["subset", "rows", "picture", "file", "language"]
    assert [line.split() for line in lines[1:4]] == [
        *(["s", "3", "2", "-", "-"], ["t", "1", "-", "-", "1"], ["total", "4", "2", "1", "1"])
    ]
    assert "error: picture, 2 (missing, unreadable, cut off, or far too large)" in lines
    assert "  a.jsonl:2: is empty" in lines
    assert any(line.split() == ["geo170k,", "correctness", "4.0", "2.0", "2.00", "100%"] for line in lines)
    assert "words of chosen and rejected, mean ratio, how often chosen is longer:" in lines
    places = [number for number, line in enumerate(lines) if not line]
    assert [lines[number + 1].split(":")[0].split(",")[0] for number in places][:3] == [
        *("words of chosen and rejected", "how the responses of a pair differ", "error")
    ]
    assert difference_rows(made) == [("geo170k, correctness", ["50%", "50%", "100.0%"])]
    made.model = "m"
    assert difference_rows(made)[0][1][3:] == ["-", "-", "-", "-", "0"]
    made.gaps["geo170k", "correctness"] = LikelihoodGap(1200, -1.5, -2.0, 0.75)
    assert difference_rows(made)[0][1][3:] == ["-1.50", "-2.00", "+0.50", "75%", "1,200"]
    assert "chosen (nats a token), rejected, gap, chosen likelier, pairs scored" in text_table(made)
    numbers = report_json(made)
    assert (numbers["errors"], numbers["warnings"], numbers["rows"], numbers["model"]) == (3, 1, {"s": 3, "t": 1}, "m")
    assert numbers["findings"][0] == {"kind": "picture", "subset": "s", "number": 2}
    (row,) = numbers["differences"]
    assert (row["source"], row["rule"], row["place"], row["likelihood"]["gap"]) == ("geo170k", "correctness", 0.5, 0.5)
    assert report_json(report())["model"] is None and report_json(report())["differences"][0]["likelihood"] is None


def test_what_was_found_of_a_benchmark():
    made = report()
    made.index = BenchmarkIndex(examples=[("pope", "1"), ("pope", "2"), ("crpe", "1")])
    made.index.num_unreadable["pope"] = 1
    made.matched["picture"] |= {0, 1}
    made.matched["both"] |= {0}
    made.matched["question"] |= {2}
    assert contamination_rows(made) == [
        (
            "pope",
            "of 2 questions 1 found by picture and words, 2 by picture, 0 by words; "
            "1 of its pictures could not be read",
        ),
        ("crpe", "of 1 questions 0 found by picture and words, 0 by picture, 1 by words"),
    ]
    assert "pope: of 2 questions 1 found by picture and words" in text_table(made)


def test_runs_of_words():
    assert word_runs("A b, c!", (2,)) == {"a b", "b c"} and word_runs("a b", (3,)) == set()
    assert word_runs(" ".join("abcdefgh")) == {"a b c d e f g h"} and word_runs("a b c d e f g") == set()
    index = BenchmarkIndex(runs={"a b": [1, 2], "b c d": [3]}, lengths={2, 3})
    assert index.of_text("x A B, c d") == {1, 2, 3} and index.of_text("b a") == set()
    assert array("Q", [1]).itemsize == 8  # hashes of 64 bits fit


def test_words_that_ten_questions_of_a_benchmark_share_are_its_instructions(monkeypatch):
    question = "please answer the question with one word only"
    for number, runs in ((9, {question: list(range(9))}), (10, {})):
        examples = [SimpleNamespace(id=str(n), question=question, images=()) for n in range(number)]
        benchmark = SimpleNamespace(examples=lambda folder, root, examples=examples: examples)
        monkeypatch.setattr(contamination, "load_benchmark", lambda name, benchmark=benchmark: benchmark)
        index = contamination.build_index({"pope": "folder"})
        assert index.examples == [("pope", str(n)) for n in range(number)]
        assert (index.runs, index.lengths, index.questions) == (runs, {8}, [question] * number)


def test_a_picture_that_cannot_be_read_counts_once_and_the_others_belong_to_their_questions(monkeypatch):
    def opened(name: str) -> Image.Image:
        if name == "broken":
            raise BadInputError(name)
        return Image.radial_gradient("L") if name == "one" else Image.linear_gradient("L")

    shown = (("one", "broken"), ("broken", "other"), ("one",), ())
    examples = [SimpleNamespace(id=str(n), question="?", images=images) for n, images in enumerate(shown)]
    monkeypatch.setattr(contamination, "load_benchmark", lambda name: SimpleNamespace(examples=lambda *given: examples))
    monkeypatch.setattr(contamination, "open_image", opened)
    index = contamination.build_index({"pope": "folder"})
    assert (index.num_unreadable, index.owners, index.lengths) == ({"pope": 1}, [0, 1, 2], set())
    assert index.of_picture(opened("one")) == {0, 2}
    assert index.of_picture(opened("other")) == {1}


def test_a_question_of_five_words_is_looked_for_and_one_of_four_is_not(monkeypatch):
    words = "one two three four five six seven eight nine"
    texts = [" ".join(words.split()[:count]) for count in (4, 5, 8, 9)]
    examples = [SimpleNamespace(id=str(n), question=text, images=()) for n, text in enumerate(texts)]
    monkeypatch.setattr(contamination, "load_benchmark", lambda name: SimpleNamespace(examples=lambda *given: examples))
    index = contamination.build_index({"pope": "folder"})
    assert index.lengths == {5, 8}
    runs = {texts[1]: [1], texts[2]: [2, 3], " ".join(words.split()[1:]): [3]}
    assert index.runs == runs
    assert [index.of_text(text) for text in texts] == [set(), {1}, {1, 2, 3}, {1, 2, 3}]


def test_the_manifest_of_a_data_set_on_the_hub_is_that_of_its_revision(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text('{"meta": {"s": {"root": "images"}}}')
    asked = []

    def download(*names, **options) -> str:
        asked.append((names, options))
        return str(tmp_path / "manifest.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for data, revision in (("hub:me/x@v1:cfg", "v1"), ("hub:me/x", None)):
        assert restore._meta(data) == {"s": {"root": "images"}}
        assert asked.pop() == (("me/x", "manifest.json"), {"repo_type": "dataset", "revision": revision})
    assert restore._meta(str(tmp_path)) == {"s": {"root": "images"}}
    with pytest.raises(BadInputError, match=r"holds no manifest\.json, so the settings of its subsets are not known"):
        restore._meta(str(tmp_path / "nowhere"))


def test_a_picture_is_written_once_and_no_other_over_it(tmp_path):
    path = tmp_path / "a/1.png"
    assert restore._write_picture(path, b"one") and not restore._write_picture(path, b"one")
    for other in (b"two", b"longer"):
        with pytest.raises(BadInputError, match="two different pictures of the data set have the path"):
            restore._write_picture(path, other)
    assert path.read_bytes() == b"one"


def test_a_report_shows_the_first_five_of_a_kind_and_counts_all(tmp_path):
    (tmp_path / "a.jsonl").write_text("no json\n" * 7)
    made = check(str(tmp_path / "a.jsonl"))
    assert [one.where for one in made.examples["unusable row"]] == [f"{tmp_path}/a.jsonl:{n}" for n in range(1, 6)]
    assert made.kinds == {("unusable row", "a"): 7} and made.counts == {"a": 7}


@pytest.mark.parametrize(
    ("pictures", "questions", "kind", "detail"),
    [
        ({3, 1, 2}, {1, 3}, "in a benchmark", "pope 1: picture and question"),
        ({3, 2}, {1}, "benchmark picture", "looks like that of crpe 2"),
        (set(), {3, 2}, "benchmark question", "crpe 2: 'Q2'"),
    ],
)
def test_of_several_examples_of_a_benchmark_the_first_is_named(pictures, questions, kind, detail):
    names = ["pope", "pope", "crpe", "crpe"]
    index = SimpleNamespace(
        of_text=lambda text: questions if text == "How many cats?" else set(),
        examples=[(name, str(number)) for number, name in enumerate(names)],
        questions=[f"Q{number}" for number in range(4)],
    )
    looker, noted = SimpleNamespace(index=index, part=Part("a")), []
    _Looker._contamination(
        looker, pair(question="<image>\nHow many cats?"), "s", "a:1", pictures, lambda *found: noted.append(found)
    )
    assert noted == [(kind, detail)]
    matched = {"both": pictures & questions, "picture": pictures, "question": questions}
    assert {name: found for name, found in looker.part.matched.items() if found} == {
        k: v for k, v in matched.items() if v
    }


@pytest.mark.parametrize(("size", "shown"), [((480, 60), (240, 30)), ((60, 480), (30, 240)), ((20, 30), (20, 30))])
def test_a_picture_that_looks_like_one_of_a_benchmark_is_kept_small(size, shown):
    content = io.BytesIO()
    Image.new("RGBA", size, "red").save(content, "PNG")
    looker = SimpleNamespace(index=SimpleNamespace(of_picture=lambda image: {5, 3}), part=Part("a"))
    assert _Looker._lookalikes(looker, content.getvalue(), "a:1") == {3, 5}
    ((example, where, small),) = looker.part.shown
    with Image.open(io.BytesIO(small)) as image:
        assert (example, where, image.size, image.format) == (3, "a:1", shown, "JPEG")
    for number in range(2 * MAX_SHOWN):
        _Looker._lookalikes(looker, content.getvalue(), f"a:{number}")
    assert len(looker.part.shown) == MAX_SHOWN == 24
    looker.index.of_picture = lambda image: set()
    looker.part.shown.clear()
    assert _Looker._lookalikes(looker, content.getvalue(), "a:1") == set()
    assert looker.part.shown == []
