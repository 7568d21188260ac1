"""Every fault put into a release is found, named with file and line, and nothing else is."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from internvl_mpo.errors import BadInputError
from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mmpr.check import check
from internvl_mpo.mmpr.contamination import BenchmarkIndex, build_index, signature
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.copies import similarity_hash
from internvl_mpo.mmpr.findings import KINDS, Finding, Report
from internvl_mpo.mmpr.shard_plan import Options

ROOT = Path(__file__).resolve().parents[1]
SUMS = "CLEVR_math_digits_pairs_vqa_correctness_rules"
OTHER = (
    "It seems that there are a few signs on white paper but nobody could say what they were meant to mean at all today"
)
LONG = "The first digit is seven and the second digit is two so I multiply them and get fourteen which I check again "


@pytest.fixture
def raw(tmp_path) -> Path:
    make_release(MMPRSettings(output=str(tmp_path / "raw"), release="folders", num_pictures=5))
    return tmp_path / "raw"


def edit(raw: Path, subset: str, change) -> Path:
    """Change the rows of a subset in place; `length` in meta.json follows."""
    path = raw / "annotations" / f"{subset}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = change(rows) or rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = json.loads((raw / "meta.json").read_text())
    meta[subset]["length"] = len(rows)
    (raw / "meta.json").write_text(json.dumps(meta))
    return path


def found(data: Path, **options) -> dict[str, list[str]]:
    """Kind -> places, from the rejects file."""
    out = io.StringIO()
    report = check(str(data), rejects=out, **options)
    places: dict[str, list[str]] = {}
    for line in out.getvalue().splitlines():
        row = json.loads(line)
        assert row["severity"] == KINDS[row["kind"]][0]
        assert row["reason"]
        places.setdefault(row["kind"], []).append(row["row"])
    assert Counter({kind: len(rows) for kind, rows in places.items()}) == _by_kind(report)
    return places


def _by_kind(report) -> Counter:
    counts: Counter = Counter()
    for (kind, _), number in report.kinds.items():
        counts[kind] += number
    return counts


def test_a_clean_release_has_no_findings_in_any_form(raw, tmp_path):
    assert found(raw) == {}
    make_release(MMPRSettings(output=str(tmp_path / "zipped"), num_pictures=5))
    assert found(tmp_path / "zipped", workers=2) == {}
    convert(Options(str(raw)), tmp_path / "parquet")
    assert found(tmp_path / "parquet") == {}
    counts = {
        report.data: (report.counts, report.statistics.rows) for report in map(check, (str(raw), f"{tmp_path}/parquet"))
    }
    assert counts[str(raw)] == counts[f"{tmp_path}/parquet"] and sum(counts[str(raw)][0].values()) == 5 * 9


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("unusable row", lambda rows: rows[3].update(rejected=rows[3]["chosen"])),
        ("unusable row", lambda rows: rows[3].pop("question")),
        ("picture", lambda rows: rows[3].update(image="nowhere.png")),
        ("picture", lambda rows: rows[3].update(image="../../../etc/passwd")),
        ("same row", lambda rows: rows[3].update(rows[1])),
        ("same id", lambda rows: (rows[0].update(id="x"), rows[3].update(id="x"))),
        ("near equal", lambda rows: rows[3].update(chosen="Final answer: 12", rejected="final   answer 12.")),
        ("repeats itself", lambda rows: rows[3].update(chosen="I look at the picture. " * 30)),
        ("language", lambda rows: rows[3].update(chosen="图片里有两个数字,它们的和是十二。")),
        (
            "near copy",
            lambda rows: [rows[n].update(rows[2], chosen=f"{LONG} {n}", rejected=OTHER) for n in (2, 3)],
        ),
    ],
)
def test_a_fault_of_a_row_is_found_at_its_line_raw_and_in_parquet(raw, tmp_path, kind, change):
    def in_place(rows):
        change(rows)

    path = edit(raw, SUMS, in_place)
    assert found(raw) == {kind: [f"{path}:4"]}
    if KINDS[kind][0] == "warning":  # rows with errors are not converted
        convert(Options(str(raw)), tmp_path / "parquet")
        assert found(tmp_path / "parquet") == {
            kind: [f"{tmp_path}/parquet/data/CLEVR_math_digits/train-00000-of-00001.parquet:row 3"]
        }


def test_a_release_without_a_usable_row_is_checked_all_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text("no json\n\n")
    assert found(tmp_path / "a.jsonl") == {"unusable row": [f"{tmp_path}/a.jsonl:1"]}


def test_a_cut_line_a_cut_picture_and_a_short_file_are_found(raw):
    path = edit(raw, SUMS, lambda rows: None)
    content = path.read_text()
    path.write_text(content[: content.rindex("question")])
    picture = raw / "images" / "RLAIF-V" / "00002.png"
    picture.write_bytes(picture.read_bytes()[:-60])
    meta = json.loads((raw / "meta.json").read_text())
    meta["RLAIF-V"]["length"] = 6
    (raw / "meta.json").write_text(json.dumps(meta))
    rlaif = raw / "annotations" / "RLAIF-V.jsonl"
    assert found(raw) == {
        "unusable row": [f"{path}:15"],
        "picture": [f"{rlaif}:3"],
        "count": [str(rlaif)],
    }
    assert "picture" not in found(raw, decode=False)


def test_a_changed_and_a_missing_shard_are_found(raw, tmp_path):
    convert(Options(str(raw)), tmp_path / "parquet")
    first, second = sorted((tmp_path / "parquet/data").glob("*/*.parquet"))[:2]
    content = bytearray(first.read_bytes())
    content[40] ^= 1
    first.write_bytes(content)
    second.unlink()
    assert set(found(tmp_path / "parquet")["file"]) == {str(first), str(second)}
    first.write_bytes(content[: len(content) // 2])
    assert set(found(tmp_path / "parquet")["file"]) == {str(first), str(second)}


def test_pictures_under_other_names_than_their_paths_are_found(raw, tmp_path):
    convert(Options(str(raw)), tmp_path / "parquet")
    path = next(iter(sorted((tmp_path / "parquet/data/CLEVR_math_digits").glob("*.parquet"))))
    rows = pq.read_table(path).to_pylist()
    rows[1]["image_paths"] = ["other.png"]
    (tmp_path / "one").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), tmp_path / "one/a.parquet")
    assert found(tmp_path / "one") == {"picture": [f"{tmp_path}/one/a.parquet:row 1"]}


def test_a_part_that_is_cut_off_is_an_error(tmp_path):
    make_release(MMPRSettings(output=str(tmp_path / "raw"), num_pictures=20))
    part = tmp_path / "raw" / "images.zip_ac"
    part.write_bytes(part.read_bytes()[:100])
    places = found(tmp_path / "raw")
    assert len(places["file"]) == 1
    assert places["picture"]


def test_lines_keep_their_numbers_when_a_file_is_cut_into_parts(raw, monkeypatch):
    from internvl_mpo.mmpr import check as mmpr_check

    monkeypatch.setattr(mmpr_check, "INDEX_BYTES", 700)  # two to three rows
    path = edit(raw, SUMS, lambda rows: rows[11].update(rejected=rows[11]["chosen"]))
    edit(raw, SUMS, lambda rows: rows[13].update(rows[2]))
    assert found(raw) == {"unusable row": [f"{path}:12"], "same row": [f"{path}:14"]}


# --- benchmarks -------------------------------------------------------------------------------------------------------


def scene(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A picture of its own for every seed."""
    import random

    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        draw.ellipse(
            (x, y, x + rng.randrange(20, 120), y + rng.randrange(20, 120)),
            fill=tuple(rng.randrange(256) for _ in range(3)),
        )
    return image


@pytest.fixture
def mathvision(tmp_path) -> Path:
    folder = tmp_path / "mathvision"
    (folder / "images").mkdir(parents=True)
    questions = (
        "How many red circles are drawn to the left of the tallest blue tower?",
        "What is the perimeter of the polygon that encloses all seven marked points?",
        "Which of the four nets folds into the cube that is shown beside them?",
    )
    rows = []
    for number, question in enumerate(questions):
        scene(number).save(folder / "images" / f"{number}.jpg", quality=90)
        rows.append(
            {
                "id": str(number),
                "question": question,
                "options": [],
                "image": f"images/{number}.jpg",
                "answer": "3",
                "solution": None,
                "level": 1,
                "subject": "counting",
            }
        )
    (folder / "testmini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_benchmark_picture_and_question_in_training_data_are_found(raw, mathvision):
    index = build_index({"mathvision": str(mathvision)})
    assert found(raw, index=index) == {}
    folder = raw / "images" / "CLEVR_digits"
    for number in (0, 1):  # the benchmark's pictures, smaller and saved again
        scene(number).resize((200, 150)).save(folder / f"copy{number}.jpg", quality=50)
    scene(99).save(folder / "other.jpg")

    def contaminate(rows):
        rows[0].update(image="copy0.jpg", question="<image>\nhow many red circles are drawn to the left of the tower?")
        rows[1].update(image="copy1.jpg")
        rows[2].update(image="other.jpg", question="<image>\nWhich of the four nets folds into the cube, do you think?")

    path = edit(raw, SUMS, contaminate)
    assert found(raw, index=index) == {
        "in a benchmark": [f"{path}:1"],
        "benchmark picture": [f"{path}:2"],
        "benchmark question": [f"{path}:3"],
    }
    report = check(str(raw), index=index)
    assert {kind: len(examples) for kind, examples in report.matched.items()} == {
        "both": 1,
        "picture": 2,
        "question": 2,
    }
    assert report.index is index
    assert [(index.examples[example][1], where) for example, where, _ in report.shown] == [
        ("0", f"{path}:1"),
        ("1", f"{path}:2"),
    ]


def test_a_finding_says_its_kind_its_place_its_subset_and_what_is_wrong(tmp_path):
    rows = ["{" if number < 7 else json.dumps({"question": f"{number}?", "chosen": "yes", "rejected": "no"})
            for number in range(9)]  # fmt: skip
    rows[8] = json.dumps({"question": "8?", "chosen": "Yes!", "rejected": "yes", "image": "absent.png"})
    (tmp_path / "one.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "images").mkdir()
    meta = {"mine": {"root": "images", "annotation": "one.jsonl", "repeat_time": 1, "length": 12}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    out = io.StringIO()
    report = check(str(tmp_path / "meta.json"), rejects=out)
    place = f"{tmp_path}/one.jsonl"
    unusable = report.examples["unusable row"]
    assert [(one.where, one.subset) for one in unusable] == [(f"{place}:{number}", "mine") for number in range(1, 6)]
    assert all(one.kind == "unusable row" and one.detail.startswith("not valid JSON") for one in unusable), unusable[0]
    assert report.kinds == {("unusable row", "mine"): 7, ("count", "mine"): 1, ("picture", "mine"): 1,
                            ("near equal", "mine"): 1}  # fmt: skip
    assert report.examples["count"] == [Finding("count", place, "mine", "9 rows, meta.json says 12")]
    (picture,) = report.examples["picture"]
    assert (picture.where, picture.subset) == (f"{place}:9", "mine")
    assert "absent.png" in picture.detail
    (equal,) = report.examples["near equal"]
    assert (equal.where, equal.subset) == (f"{place}:9", "mine")
    assert len(out.getvalue().splitlines()) == 10
    assert set(report.differences.sums) == set(report.statistics.rows) == {("mine", "other")}
    assert (report.num("error"), report.num("warning")) == (9, 1)


def test_a_broken_picture_is_found_at_every_row_that_shows_it(tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "empty.png").touch()
    rows = [{"question": f"{number}?", "chosen": "yes", "rejected": "no", "image": name}
            for number, name in enumerate(["1.png", "1.png", "empty.png", "1.png"])]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(str(tmp_path / "a.jsonl"))
    reason = "image '1.png' cannot be decoded (cannot identify image file)"
    found = [(one.where.rpartition(":")[2], one.detail) for one in report.examples["picture"]]
    assert found == [("1", reason), ("2", reason), ("3", "image 'empty.png' is empty"), ("4", reason)]


def test_rows_of_parquet_that_are_no_pairs_or_show_other_pictures_are_told_apart(raw, tmp_path):
    convert(Options(str(raw)), tmp_path / "made")
    path = next((tmp_path / "made" / "data" / "CLEVR_math_digits").glob("*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["chosen"], rows[1]["image_paths"] = rows[0]["rejected"], ["another.png"]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    report = check(str(path))
    (unusable,) = report.examples["unusable row"]
    assert (unusable.where, unusable.subset) == (f"{path}:row 0", rows[0]["subset"])
    assert unusable.detail == "'chosen' equals 'rejected', so there is nothing to prefer"
    assert report.examples["picture"] == [
        Finding("picture", f"{path}:row 1", rows[1]["subset"], "images and image_paths differ")
    ]


def test_equal_words_about_pictures_of_two_folders_are_no_copy_and_without_a_picture_they_are(tmp_path):
    meta = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        scene(len(meta)).save(tmp_path / name / "1.png")
        responses = {"chosen": "a" * 9, "rejected": "b" * 9}
        rows = [{"id": f"{name}0", "image": "1.png", "question": "Which shapes?", **responses},
                {"id": f"{name}1", "question": "Which numbers?", **responses}]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        meta[name] = {"root": name, "annotation": f"{name}.jsonl", "repeat_time": 1}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    report = check(str(tmp_path / "meta.json"))
    found = {kind: [finding.where for finding in findings] for kind, findings in report.examples.items() if findings}
    assert found == {"same row": [f"{tmp_path}/two.jsonl:2"]}


def test_an_empty_page_looks_like_no_other():
    assert signature(Image.new("RGB", (300, 200), "white")) is None
    assert signature(scene(1)) is not None
    for grey, is_empty in ((107, True), (109, False)):  # standard deviations of 3.5 and 4.5
        halves = Image.new("L", (32, 32), 100)
        halves.paste(grey, (0, 0, 16, 32))
        assert (signature(halves) is None) is is_empty
    index = BenchmarkIndex()
    assert (index.hashes.shape, index.thumbnails.shape, index.of_picture(scene(1))) == ((0,), (0, 256), set())
    one = signature(scene(1))
    index.hashes, index.thumbnails, index.owners = np.array([one.bits]), np.stack([one.thumbnail]), [7]
    assert index.of_picture(scene(1)) == {7}
    assert index.of_picture(scene(2)) == index.of_picture(Image.new("RGB", (300, 200), "white")) == set()


def test_similar_texts_have_near_hashes_and_short_ones_none():
    one, other = similarity_hash(LONG * 3, LONG * 2), similarity_hash(LONG * 3 + "and again", LONG * 2)
    far = similarity_hash(
        "We need to see that the car is parked behind a tree near the house. " * 3, "Nothing of it. " * 9
    )
    assert (one ^ other).bit_count() <= 8
    assert (one ^ far).bit_count() > 16
    assert similarity_hash("Final answer: 3", "Final answer: 4") == 0


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_prints_a_table_writes_a_report_and_fails_on_errors_only(raw, mathvision, tmp_path):
    program = [sys.executable, str(ROOT / "dataset_scripts/check_mmpr.py"), str(raw), "--output", str(tmp_path / "out")]
    program += ["--benchmarks", f"mathvision={mathvision}"]
    edit(raw, SUMS, lambda rows: rows[3].update(chosen="I look at the picture. " * 30))
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 errors, 1 warnings" in done.stdout
    path = edit(raw, SUMS, lambda rows: rows[5].update(image="nowhere<b>.png"))
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{path}:6: image 'nowhere<b>.png' is not in" in done.stdout
    assert "mathvision: of 3 questions 0 found" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 errors, 1 warnings" in page
    assert "nowhere&lt;b&gt;.png" in page and "<b>.png" not in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 2
    assert subprocess.run([*program[:2], str(tmp_path / "nothing")], capture_output=True).returncode == 2


def test_a_benchmark_that_is_not_there_is_refused():
    with pytest.raises(BadInputError, match="unknown benchmark 'popes'"):
        build_index({"popes": "x"})


def test_findings_are_counted_by_their_severity():
    report = Report("raw")
    errors = [kind for kind, (severity, _) in KINDS.items() if severity == "error"]
    for kind in errors:
        report.kinds[kind, "one"], report.kinds[kind, "another"] = 1, 1
    report.kinds["repeats itself", "one"] = 3
    assert (report.num("error"), report.num("warning")) == (2 * len(errors), 3)


def test_rows_that_differ_in_the_question_alone_are_no_copies_and_differences_count_from_the_chosen(tmp_path):
    """Letters beyond ASCII tell rows apart as well."""
    same = {"image": "1.png", "chosen": f"a b c d {LONG}", "rejected": "a x"}
    scene(1).save(tmp_path / "1.png")
    rows = [{"question": "ü?", **same}, {"question": "ä?", **same}, {"question": "ä?", **same, "system": "s"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(str(tmp_path / "a.jsonl"))
    assert report.kinds == {}
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):  # a near copy has both nearly equal
        rows = [{"question": "?", side: f"{LONG * 2} end", other: f"{text} " * 20} for text in ("one two", "a b c d")]
        (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert not [kind for kind, _ in check(str(tmp_path / "b.jsonl")).kinds if "near" in kind]
    mean = report.differences.mean(("a", "other"))
    assert (mean.pairs, mean.place) == (3, pytest.approx(1 / (4 + len(LONG.split()))))


def test_a_signature_is_the_signs_of_low_waves_and_a_small_picture():
    """Another size or another wave, and an index of benchmarks finds what it should not, or nothing."""
    picture = scene(3)
    small = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    places, waves = np.arange(32), np.arange(8)
    cosines = np.cos(np.pi * (2 * places + 1) * waves[:, None] / 64)
    found = np.einsum("ux,xy,vy->uv", cosines, small, cosines).ravel()
    bits = found > np.median(found[1:])
    one = signature(picture)
    assert np.unpackbits(np.array([one.bits]).view(np.uint8)).tolist() == [0, *bits[1:].astype(int)]
    tiny = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BICUBIC), np.float64).ravel()
    assert one.thumbnail == pytest.approx((tiny - tiny.mean()) / np.linalg.norm(tiny - tiny.mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("num_bits", "correlation", "is_same"), [(8, 1, True), (9, 1, False), (0, 0.975, True), (0, 0.965, False)]
)
def test_pictures_look_alike_by_eight_bits_and_a_correlation(num_bits, correlation, is_same):
    one = signature(scene(1))
    across = np.roll(one.thumbnail, 100)
    across = across - (across @ one.thumbnail) * one.thumbnail
    across /= np.linalg.norm(across)
    index = BenchmarkIndex()
    index.hashes = np.array([one.bits ^ np.uint64((1 << num_bits) - 1)])
    index.thumbnails = np.stack([correlation * one.thumbnail + (1 - correlation**2) ** 0.5 * across])
    index.owners = [7]
    assert index.of_picture(scene(1)) == ({7} if is_same else set())
