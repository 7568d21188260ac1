"""A conversion that is killed goes on: nothing is made twice, and what comes out has the same bytes.

pytest tests/test_mmpr_resume.py
"""

import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmpr_world import hashes
from PIL import Image

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr import convert as module
from internvl_mpo.mmpr import restore as restoring
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.manifest import file_facts
from internvl_mpo.mmpr.restore import restore
from internvl_mpo.mmpr.shard_plan import Options, plan
from internvl_mpo.mmpr.shard_writer import done_mark
from internvl_mpo.mmpr.statistics import ReleaseStatistics

SHARD_BYTES = 1500
MARKS = ["e8ba65872b17951a", "52e899cc2594502a", "abe82b4800667c8a", "7acf1d45c160bdad"]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Two sources, several shards of each; a line that is none, an id that comes twice, a broken picture."""
    folder, meta = tmp_path_factory.mktemp("release"), {}
    for name in ("red", "blue"):
        (folder / name).mkdir()
        lines = []
        for number in range(12):
            Image.new("RGB", (28, 28), name).save(folder / name / f"{number}.png")
            row = {"id": f"{name}{number}", "image": f"{number}.png", "question": f"{name} {number}?"}
            lines.append(json.dumps({**row, "chosen": "yes " * 60, "rejected": "no " * 60}))
        lines[3] = "{"
        meta[name] = {"root": name, "annotation": f"{name}.jsonl", "repeat_time": 1}
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, lines[5], ""]))
    (folder / "blue" / "7.png").write_bytes(b"no picture")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def options(release: Path, **more) -> Options:
    return Options(str(release / "meta.json"), **{"shard_bytes": SHARD_BYTES, **more})


@pytest.fixture(scope="module")
def unbroken(release, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    result = convert(options(release), output)
    assert (result.num_rows, result.num_rejects, len(result.shards) > 6) == (21, 5, True)
    return output


def test_the_manifest_holds_what_readers_and_the_card_need(release, unbroken):
    text = (unbroken / "manifest.json").read_text()
    assert text.endswith("}\n")
    manifest = json.loads(text)
    keys = ["version", "num_rows", "num_rejects", "shards", "meta", "statistics", "fingerprint"]
    assert list(manifest) == keys
    assert (manifest["version"], manifest["num_rows"], manifest["num_rejects"]) == (1, 21, 5)
    rejects = [json.loads(line) for line in unbroken.with_name("out.rejects.jsonl").read_text().splitlines()]
    places = [row["row"].rpartition("/")[2] for row in rejects]
    assert places == ["red.jsonl:4", "red.jsonl:13", "blue.jsonl:4", "blue.jsonl:8", "blue.jsonl:13"]
    assert manifest["meta"] == json.loads((release / "meta.json").read_text())
    assert sum(shard["num_rows"] for shard in manifest["shards"] if shard["source"] != "tiny") == 21
    statistics = ReleaseStatistics.from_json(manifest["statistics"])
    assert dict(statistics.subsets) == {"red": 11, "blue": 10}
    assert manifest["fingerprint"] == module._fingerprint(options(release), options(release).subsets())
    for shard in manifest["shards"]:
        assert shard.items() >= file_facts(unbroken / shard["path"]).items()


def test_a_source_without_a_usable_row_leaves_no_shard_and_its_line_among_the_rejects(tmp_path):
    meta = {}
    for name, line in (("bad", "{"), ("good", '{"question": "1+1?", "chosen": "2", "rejected": "3"}')):
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
        meta[name] = {"annotation": f"{name}.jsonl", "root": "x", "repeat_time": 1, "note": "für"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    result = convert(Options(str(tmp_path / "meta.json")), tmp_path / "out")
    assert [(shard["source"], shard["num_rows"]) for shard in result.shards] == [("good", 1), ("tiny", 1)]
    assert [path.name for path in (tmp_path / "out" / "data").rglob("*.parquet")] == ["train-00000-of-00001.parquet"]
    assert (result.num_rows, result.num_rejects) == (1, 1)
    assert '"note": "für"' in (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")


def test_paths_of_a_cluster_leave_what_is_published_and_what_tells_annotations_apart_is_their_content(tmp_path):
    entry = {"root": "/mnt/a/b/images", "annotation": "/mnt/x/one.jsonl", "repeat_time": 2}
    assert module._published(entry) == {**entry, "root": "b/images", "annotation": "x/one.jsonl"}
    assert module._published({"repeat_time": 2}) == {"repeat_time": 2}
    (tmp_path / "one.jsonl").write_text("{}")
    assert module._content_mark(tmp_path / "one.jsonl") == file_facts(tmp_path / "one.jsonl")["sha256"]
    assert module._content_mark(SimpleNamespace(version="of a table")) == "of a table"


def test_what_was_converted_comes_back_line_by_line_and_picture_by_picture(release, unbroken, tmp_path):
    assert restore(str(unbroken), tmp_path / "raw") == (21, 21)
    meta = json.loads((release / "meta.json").read_text())
    assert json.loads((tmp_path / "raw" / "meta.json").read_text()) == meta
    assert (tmp_path / "raw" / "meta.json").read_text().endswith("}\n")
    for name, gone in (("red", {3, 12}), ("blue", {3, 7, 12})):
        lines = (release / f"{name}.jsonl").read_text().splitlines()
        kept = [json.loads(line) for number, line in enumerate(lines) if number not in gone]
        found = (tmp_path / "raw" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in found] == kept
        for row in kept:
            path = Path(name) / row["image"]
            assert (tmp_path / "raw" / path).read_bytes() == (release / path).read_bytes()
    with pytest.raises(BadInputError, match="raw is not empty; give another --output"):
        restore(str(unbroken), tmp_path / "raw")


def counted(monkeypatch, fails_at: int | None = None) -> list[str]:
    """Paths of the shards that are written from now on."""
    written, real = [], module.write_shard

    def write(shard, **more):
        if len(written) == fails_at:
            raise KeyboardInterrupt
        written.append(shard.path)
        return real(shard, **more)

    monkeypatch.setattr(module, "write_shard", write)
    return written


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_conversion_that_was_killed_makes_what_is_missing_and_the_same_bytes(
    release, unbroken, tmp_path, monkeypatch, fails_at
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = counted(patch, fails_at)
        convert(options(release), output)
    assert not (output / "manifest.json").exists()
    monkeypatch.setattr(module, "plan", lambda *given: pytest.fail("the plan is there"))
    later = counted(monkeypatch)
    result = convert(options(release), output)
    assert first + later == [shard["path"] for shard in result.shards if shard["source"] != "tiny"]
    assert len(first) == fails_at
    assert hashes(output) == hashes(unbroken)
    rejects = [folder.with_name("out.rejects.jsonl").read_text() for folder in (output, unbroken)]
    assert rejects[0] == rejects[1]
    assert not output.with_name("out.work").exists()


def test_a_shard_that_is_gone_or_cut_short_is_made_again_and_no_other(release, unbroken, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = counted(patch, 4)
        convert(options(release), output)
    (output / first[0]).unlink()
    (output / first[2]).write_bytes((output / first[2]).read_bytes()[:-1])
    later = counted(monkeypatch)
    convert(options(release), output)
    assert later[:2] == [first[0], first[2]]
    assert not set(later[2:]) & set(first)
    assert hashes(output) == hashes(unbroken)


def test_what_is_finished_is_not_touched_and_a_shard_that_is_gone_makes_it_unfinished(
    release, unbroken, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    shutil.copytree(unbroken, output)
    written = counted(monkeypatch)
    again = convert(options(release), output)
    assert written == []
    assert (again.num_rows, again.num_rejects) == (21, 5)
    assert again.shards == json.loads((output / "manifest.json").read_text())["shards"]
    with pytest.raises(BadInputError, match="was made from another release or with other settings"):
        convert(options(release, decode=False), output)
    shard = output / again.shards[1]["path"]
    for damage in (shard.unlink, lambda: shard.write_bytes(b"PAR1")):
        damage()
        convert(options(release), output)
        assert hashes(output) == hashes(unbroken)
    assert len(written) == 2 * (len(again.shards) - 1)


def test_half_of_another_conversion_is_not_gone_on_with(release, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, 1)
        convert(options(release), output)
    with pytest.raises(BadInputError, match=r"holds a half-finished conversion of another release or with other"):
        convert(options(release, shard_bytes=SHARD_BYTES + 1), output)
    assert convert(options(release), output).num_rows == 21


def test_a_plan_comes_back_as_it_was_kept(release, tmp_path):
    asked = options(release)
    shards = plan(asked, asked.subsets(), 1)
    assert any(piece.repeated for shard in shards for piece in shard.pieces)
    assert any(piece.num_tiny for shard in shards for piece in shard.pieces)
    assert module._load_plan(tmp_path, "mark", tmp_path) is None
    module._save_plan(tmp_path, "mark", shards)
    found = module._load_plan(tmp_path, "mark", tmp_path)
    assert found == shards
    assert [asdict(shard) for shard in found] == [asdict(shard) for shard in shards]
    assert not module._is_done(tmp_path, tmp_path, shards[0])
    done_mark(tmp_path, shards[0]).parent.mkdir(exist_ok=True)
    done_mark(tmp_path, shards[0]).write_text(json.dumps({"shard": None}))  # all of its rows were rejected
    assert module._is_done(tmp_path, tmp_path, shards[0])


def zipped(folder: Path, text: str) -> Options:
    """A release whose annotations lie in an archive."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    meta = {"one": {"root": "images", "annotation": "annotations/one.jsonl", "repeat_time": 1}}
    (folder / "meta.json").write_text(json.dumps(meta))
    with zipfile.ZipFile(folder / "annotations.zip", "w") as archive:
        archive.writestr("annotations/one.jsonl", text)
    return Options(str(folder / "meta.json"))


def test_what_an_output_belongs_to_is_known_from_version_to_version(tmp_path):
    """Another mark would refuse to go on with what an earlier version has begun."""
    line = json.dumps({"question": "1+1?", "chosen": "2", "rejected": "3"}) + "\n"
    asked = zipped(tmp_path / "zipped", line)
    marks = [module._fingerprint(asked, asked.subsets())]
    for changed in (zipped(tmp_path / "changed", line.replace("3", "4")), Options(asked.raw, decode=False)):
        marks.append(module._fingerprint(changed, changed.subsets()))
    (tmp_path / "zipped" / "annotations.zip").unlink()
    (tmp_path / "zipped" / "annotations").mkdir()
    (tmp_path / "zipped" / "annotations" / "one.jsonl").write_text(line)
    marks.append(module._fingerprint(asked, asked.subsets()))
    assert marks == MARKS


def test_names_of_subsets_are_restored_as_they_are_spelled(tmp_path, monkeypatch):
    """A subset of which no row was usable keeps its entry and an empty file."""
    monkeypatch.setattr(restoring, "open_dataset", lambda data: [])
    meta = {"ü": {"root": "images", "annotation": "a/ü.jsonl", "repeat_time": 1}, "none": {}}
    monkeypatch.setattr(restoring, "_meta", lambda data: meta)
    assert restore("x", tmp_path / "raw") == (0, 0)
    text = (tmp_path / "raw/meta.json").read_text(encoding="utf-8")
    assert text == json.dumps(meta, ensure_ascii=False, indent=2) + "\n"
    assert (tmp_path / "raw/a/ü.jsonl").read_bytes() == b""
