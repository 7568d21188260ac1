"""Folders that programs replace: what was built there goes, everything else is refused and stays.

pytest tests/test_files.py
"""

import os
from pathlib import Path

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer, check_replaceable, link, replaced_folder


def build(output: Path, text: str = "built", **options) -> None:
    with replaced_folder(output, **options) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_was_built_is_replaced_and_nothing_else_is_left_behind(tmp_path):
    build(tmp_path / "out", "one")
    build(tmp_path / "out", "two")
    assert content(tmp_path / "out") == {"sub/a.txt": "two"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.built", "out"]


@pytest.mark.parametrize(
    "touch",
    [
        lambda out: (out / "notes.txt").write_text("mine"),
        lambda out: (out / "sub" / "notes.txt").write_text("mine"),
        lambda out: (out / ".env").write_text("mine"),
        lambda out: (out / "sub" / "a.txt").write_text("built, and edited"),
        lambda out: ((out / "sub" / "a.txt").write_text("BUILT"), os.utime(out / "sub" / "a.txt", ns=(1, 1))),
        lambda out: (out / "link").symlink_to("/nowhere"),
    ],
    ids=["added", "added deeper", "hidden", "edited", "edited to the same size", "link"],
)
def test_a_built_folder_that_was_touched_stays(tmp_path, touch):
    build(tmp_path / "out")
    touch(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInputError, match="holds other things than were built there"):
        build(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_put_where_one_was_built_stays(tmp_path):
    build(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "a.txt").write_text("years of work")
    with pytest.raises(BadInputError, match=r"sub/a.txt"):
        build(tmp_path / "out")


def test_files_put_there_while_the_new_folder_is_built_stay(tmp_path):
    build(tmp_path / "out")
    with pytest.raises(BadInputError, match=r"late\.txt"), replaced_folder(tmp_path / "out"):
        (tmp_path / "out" / "late.txt").write_text("mine")
    assert (tmp_path / "out" / "late.txt").exists()


def test_a_failed_build_leaves_what_was_there_and_no_half_folder(tmp_path):
    build(tmp_path / "out", "one")
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "out") as folder:
        (folder / "b.txt").write_text("half")
        raise RuntimeError
    assert content(tmp_path / "out") == {"sub/a.txt": "one"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.built", "out"]


def test_a_linked_file_that_changed_with_its_source_does_not_stop_a_new_build(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("one")
    for text in ("one", "another"):
        source.write_text(text)  # in place: the built file changes as well
        with replaced_folder(tmp_path / "out") as folder:
            link(source, folder)
    assert content(tmp_path / "out") == {"source.txt": "another"}


@pytest.mark.parametrize("where", ["data", "data/..", "."])
def test_a_folder_of_the_sources_or_around_them_is_refused(tmp_path, where):
    (tmp_path / "data" / "images").mkdir(parents=True)
    with pytest.raises(BadInputError, match="or lies around it"):
        check_replaceable(tmp_path / where, sources=[tmp_path / "data" / "images", tmp_path / "data"])


def test_files_mount_points_and_empty_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInputError, match=r"model_dir .* is a file"):
        check_replaceable(tmp_path / "file", name="model_dir")
    with pytest.raises(BadInputError, match="mount point"):
        check_replaceable("/proc")
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty")
    assert content(tmp_path / "empty")


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    build(tmp_path / "out", "one")
    build(tmp_path / "out", "two")
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "disk") == {"sub/a.txt": "two"}


def test_a_folder_that_version_0_2_built_is_known_until_somebody_adds_to_it(tmp_path):
    """Its marker was empty; what is newer than the marker was not built by it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    (tmp_path / ".out.built").touch()
    check_replaceable(tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    later = (tmp_path / ".out.built").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "out" / "mine.txt", ns=(later, later))
    with pytest.raises(BadInputError, match=r"mine\.txt"):
        build(tmp_path / "out")


def test_other_ranks_touch_nothing(tmp_path):
    with replaced_folder(tmp_path / "out", is_main=False) as folder:
        assert folder.name == ".out.part"
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_not_finished_does_not_appear(tmp_path):
    (tmp_path / "a").write_text("whole")
    with pytest.raises(RuntimeError), atomic_writer(tmp_path / "a") as out:
        out.write("half")
        raise RuntimeError
    assert content(tmp_path) == {"a": "whole"}
