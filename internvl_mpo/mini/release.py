"""A small MMPR release from handwritten digits, in the raw layout of the official ones and with all their oddities.

    python -m internvl_mpo.mini mmpr --output outputs/mini/mmpr_raw --release v1.2

Absolute cluster paths in meta.json, one picture, several, one in a list, none (three spellings), fractions in
repeat_time, ground truths that are text or numbers, `chosen_meta`, a subset without a suffix, zip archives in parts.
Pairs are mostly right over wrong calculations, so that the release can be trained on too.
"""

import json
import random
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl_mpo.errors import BadInputError
from internvl_mpo.mini.digits import Painter
from internvl_mpo.settings import setting

CLUSTER = "/mnt/cluster/share/MMPR"


@dataclass
class MMPRSettings:
    """Settings of `python -m internvl_mpo.mini mmpr`."""

    output: str = setting(help="folder to make")
    release: Literal["v1.0", "v1.1", "v1.2", "folders"] = setting(
        "v1.2",
        help="v1.0: images.zip; v1.1: images.zip_a, _b; v1.2: images.zip_aa .., annotations.zip; folders: unpacked",
    )
    num_pictures: int = setting(40, help="pictures of each subset that has its own")
    pairs_per_picture: int = setting(3, help="pairs about each of them")
    num_parts: int = setting(3, help="parts of the image archive of v1.2")
    seed: int = setting(0, help="decides pictures and rows")


def make_release(settings: MMPRSettings) -> None:
    """Write the release; the same settings give the same bytes."""
    output = Path(settings.output)
    if output.exists() and any(output.iterdir()):
        raise BadInputError(f"{output} is not empty; give another --output")
    if settings.num_pictures < 2 or settings.pairs_per_picture < 1 or settings.num_parts < 2:
        raise BadInputError("num_pictures and num_parts must be at least 2, pairs_per_picture at least 1")
    paint = Painter(output, settings.seed)
    rng = random.Random(f"rows {settings.seed}")
    subsets: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}

    def pictures(folder: str, num_digits: int) -> list[tuple[str, list[int]]]:
        (output / "images" / folder).mkdir(parents=True, exist_ok=True)
        names = (f"{number:05d}" for number in range(settings.num_pictures))
        return [(f"{name}.png", paint(f"{folder}/{name}", num_digits, "train")[1]) for name in names]

    def add(name: str, root: str, rows: Iterable[Mapping[str, Any]], **more: Any) -> None:
        entry = {"root": f"MMPR/images/{root}", "annotation": f"{CLUSTER}/annotations/{name}.jsonl"}
        rows = [dict(row) for row in rows]
        subsets[name] = {**entry, "data_augment": False, "repeat_time": 1, "length": len(rows), **more}, rows

    sums = pictures("CLEVR_digits", 2)
    add("CLEVR_math_digits_pairs_vqa_correctness_rules", "CLEVR_digits", _sums(sums, settings, rng), repeat_time=0.5)
    add("CLEVR_math_digits_pairs_vqa_format_rules", "CLEVR_digits", _unreadable(sums), repeat_time=2.5)
    add("m3cot_digits_pairs_vqa_direct_rules", "CLEVR_digits", _direct(sums, rng), max_dynamic_patch=6)
    add("nlvr2_digits_ov_pairs_vqa_correctness_rules", "nlvr2_digits", _compare(pictures("nlvr2_digits", 1), rng))
    add(
        "vqav2_digits_prefix_pair_sr0.5_wo_image", "coco/train2014", _open(pictures("coco/train2014", 3)), repeat_time=3
    )
    add("geos_text_pairs_vqa_correctness_rules", "geos", _text_only(settings, rng), data_augment=True)
    add("RLAIF-V", "RLAIF-V", _preferred(pictures("RLAIF-V", 2)), repeat_time=0.25)

    meta, annotations = {}, {}
    for name, (entry, rows) in subsets.items():
        meta[name] = entry
        annotations[f"annotations/{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    if settings.release == "v1.2":
        _write_zip(
            output / "annotations.zip", ((name, text.encode()) for name, text in annotations.items()), packed=True
        )
    else:
        (output / "annotations").mkdir()
        for name, text in annotations.items():
            (output / name).write_text(text, encoding="utf-8")
    if settings.release != "folders":
        _archive_images(output, settings)


def _sums(pictures: Iterable[tuple[str, list[int]]], settings: MMPRSettings, rng: random.Random) -> Iterator[dict]:
    """One picture, placeholder in the question, ground truth as text."""
    for name, (a, b) in pictures:
        first = rng.randrange(1, 4)
        for wrong in range(a + b + first, a + b + first + settings.pairs_per_picture):
            yield {
                "image": name,
                "question": "<image>\nWhat is the sum of the two digits? Reason, then write Final answer: ..",
                "chosen": f"The digits are {a} and {b}.\n{a} plus {b} is {a + b}.\n\nFinal answer: {a + b}",
                "rejected": f"The digits are {a} and {b}.\n{a} plus {b} is {wrong}.\n\nFinal answer: {wrong}",
                "answer_gt": str(a + b),
            }


def _unreadable(pictures: Iterable[tuple[str, list[int]]]) -> Iterator[dict]:
    """One picture in a list, no placeholder, ground truth as a number, meta of the responses."""
    for name, (a, b) in pictures:
        yield {
            "image": [name],
            "question": "What is the sum of the two digits? Reason, then write Final answer: ..",
            "chosen": f"{a} plus {b} is {a + b}.\n\nFinal answer: {a + b}",
            "rejected": f"I see {a} and {b}. The sum is {a + b}, I think.",
            "answer_gt": a + b,
            "chosen_meta": {"answer": str(a + b), "score": 1.0},
            "rejected_meta": {"answer": None, "score": 0},
        }


def _direct(pictures: Iterable[tuple[str, list[int]]], rng: random.Random) -> Iterator[dict]:
    """Short answers."""
    for name, (a, b) in pictures:
        yield {
            "image": name,
            "question": "<image>\nWhat is the sum of the two digits? Answer with a number.",
            "chosen": str(a + b),
            "rejected": str(a + b + rng.randint(1, 4)),
            "answer_gt": str(a + b),
        }


def _compare(pictures: list[tuple[str, list[int]]], rng: random.Random) -> Iterator[dict]:
    """Two pictures with their placeholders inside the text."""
    for (first, (a,)), (second, (b,)) in zip(pictures, [*pictures[1:], pictures[0]], strict=True):
        right, wrong = (
            ("left", "right") if a > b else ("right", "left") if b > a else ("both", rng.choice(["left", "right"]))
        )
        yield {
            "image": [first, second],
            "question": "Image-1: <image>\nImage-2: <image>\nWhich digit is larger, left or right? Say both if equal.",
            "chosen": f"The first digit is {a}, the second is {b}.\n\nFinal answer: {right}",
            "rejected": f"The first digit is {a}, the second is {b}.\n\nFinal answer: {wrong}",
            "answer_gt": right,
        }


def _open(pictures: Iterable[tuple[str, list[int]]]) -> Iterator[dict]:
    """Dropout-NTP: no ground truth."""
    for name, (a, b, c) in pictures:
        begin = f"The picture shows three handwritten digits. The first digit is {a}."
        yield {
            "image": name,
            "question": "Describe the picture.",
            "chosen": f"{begin} The second digit is {b}. The third digit is {c}.",
            "rejected": f"{begin} It stands before a grey wall with a window.",
        }


def _text_only(settings: MMPRSettings, rng: random.Random) -> Iterator[dict]:
    """No picture, said in three ways."""
    for number in range(settings.num_pictures):
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        yield {
            **({}, {"image": ""}, {"image": None})[number % 3],
            "question": f"What is {a} plus {b}? (question {number})",
            "chosen": f"Final answer: {a + b}",
            "rejected": f"Final answer: {a + b + 10}",
            "answer_gt": str(a + b),
        }


def _preferred(pictures: Iterable[tuple[str, list[int]]]) -> Iterator[dict]:
    """A subset without a suffix, with keys of its own and an id."""
    for number, (name, (a, b)) in enumerate(pictures):
        yield {
            "id": f"rlaif-{number}",
            "image": name,
            "question": "<image>\nWhat do you see?",
            "chosen": f"Two digits, {a} and {b}.",
            "rejected": "A cat on a sofa.",
            "origin_split": '{"model": "mini"}',
        }


def _archive_images(output: Path, settings: MMPRSettings) -> None:
    """Pack images/ and cut the archive into the release's parts."""
    paths = sorted(path for path in (output / "images").rglob("*") if path.is_file())
    whole = output / "images.zip"
    _write_zip(whole, ((path.relative_to(output).as_posix(), path.read_bytes()) for path in paths), packed=False)
    for path in paths:
        path.unlink()
    for folder in sorted((output / "images").rglob("*"), reverse=True):
        folder.rmdir()
    (output / "images").rmdir()
    letters = {"v1.0": None, "v1.1": ["a", "b"], "v1.2": [f"a{chr(97 + n)}" for n in range(settings.num_parts)]}
    ends = letters[settings.release]
    if ends:
        content = whole.read_bytes()
        size = -(-len(content) // len(ends))
        for number, end in enumerate(ends):
            (output / f"images.zip_{end}").write_bytes(content[number * size : (number + 1) * size])
        whole.unlink()


def _write_zip(path: Path, files: Iterable[tuple[str, bytes]], *, packed: bool) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name, date_time=(2024, 11, 15, 0, 0, 0))
            info.compress_type = archive.compression
            archive.writestr(info, content)
