"""Where the files of a release lie: on disk, in archives, and never outside or in two places at once."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr import files as module
from internvl_mpo.mmpr.files import PictureFolder, ReleaseFiles, check_picture, is_absolute, relative, suffixes


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name.encode())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a/b/c.png", "a/b/c.png b/c.png c.png"),
        ("/a/../b/./c.png", "a/b/c.png b/c.png c.png"),
        ("s3://bucket/a//b", "bucket/a/b a/b b"),
        ("C:\\a\\b", "a/b b"),
        ("file://C:\\a\\b", "a/b b"),
        ("", ""),
    ],
)
def test_a_path_is_tried_without_more_and_more_of_its_folders(name, found):
    assert list(suffixes(name)) == found.split()


def test_what_is_published_holds_no_path_of_a_cluster():
    paths = ("a/b/c", "/a/b/c", "s3://a/b/c", "\\a\\b\\c", "../a", "/c", "", "a")
    assert [relative(path) for path in paths] == ["a/b/c", "b/c", "b/c", "b/c", "a", "c", ".", "a"]
    assert [is_absolute(path) for path in ("/a", "\\a", "x://a", "a/b", "")] == [True, True, True, False, False]


def test_a_text_is_looked_for_on_disk_and_then_in_the_archives(tmp_path):
    write(tmp_path, "annotations/a.jsonl")
    zipped(tmp_path / "x.zip", "annotations/a.jsonl", "annotations/b.jsonl", "other/b.jsonl", "c.jsonl")
    files = ReleaseFiles(tmp_path)
    assert files.text("/mnt/x/annotations/a.jsonl") == tmp_path / "annotations/a.jsonl"
    assert str(files.text("/mnt/x/c.jsonl")) == f"{tmp_path}/x.zip/c.jsonl"
    assert str(files.text("annotations/b.jsonl")) == f"{tmp_path}/x.zip/annotations/b.jsonl"
    assert files.text("nowhere.jsonl") is None
    with pytest.raises(
        BadInputError, match=r"annotation file 'b\.jsonl' may be .*annotations/b\.jsonl or .*other/b\.jsonl"
    ):
        files.text("b.jsonl")
    assert [archive.name for archive in pickle.loads(pickle.dumps(files)).archives] == [f"{tmp_path}/x.zip"]
    assert files.problems == [] and ReleaseFiles(tmp_path).problems == []


def test_a_folder_that_is_named_twice_is_looked_in_once(tmp_path):
    (tmp_path / "here").mkdir()
    zipped(tmp_path / "here/x.zip", "a.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    files = ReleaseFiles(tmp_path / "here", tmp_path / "link", tmp_path / "gone", tmp_path / "here")
    assert [archive.name for archive in files.archives] == [f"{tmp_path}/here/x.zip"]
    assert str(files.text("a.jsonl")) == f"{tmp_path}/here/x.zip/a.jsonl"


def test_a_name_that_could_be_two_files_is_refused_and_one_file_twice_is_not(tmp_path):
    write(tmp_path, "one/a.jsonl", "two/one/a.jsonl")
    (tmp_path / "same").symlink_to(tmp_path / "one")
    files = ReleaseFiles(tmp_path)
    assert files.text("same/one/a.jsonl") == tmp_path / "one/a.jsonl"
    write(tmp_path, "deep/one/a.jsonl", "a.jsonl")
    with pytest.raises(BadInputError, match=r"'/x/one/a\.jsonl' may be .*/one/a\.jsonl or .*/a\.jsonl here"):
        files.text("/x/one/a.jsonl")
    assert files.text("one/a.jsonl") == tmp_path / "one/a.jsonl"  # as it stands
    other = ReleaseFiles(tmp_path / "two", tmp_path)
    assert other.text("one/a.jsonl") == tmp_path / "two/one/a.jsonl"  # the first folder is looked in first


def test_a_link_out_of_the_release_is_not_read_and_the_hubs_cache_is_none(tmp_path):
    write(tmp_path, "outside/a.jsonl", "outside/1.png", "hub/blobs/f00", "hub/snapshots/v1/images/2.png")
    release = tmp_path / "release"
    (release / "images").mkdir(parents=True)
    (release / "a.jsonl").symlink_to(tmp_path / "outside/a.jsonl")
    (release / "images/1.png").symlink_to(tmp_path / "outside/1.png")
    files = ReleaseFiles(release)
    with pytest.raises(BadInputError, match=r"annotation file 'a\.jsonl' leads out of the release, so nothing"):
        files.text("a.jsonl")
    with pytest.raises(
        RowError,
        match=r"1\.png' leads out .*, so nothing of it is read; give the folder it lies in as --image_root$",
    ):
        files.pictures("images").read("1.png")
    cached = tmp_path / "hub/snapshots/v1"
    (cached / "images/1.png").symlink_to(tmp_path / "hub/blobs/f00")
    assert ReleaseFiles(cached).pictures("images").read("1.png") == b"hub/blobs/f00"
    zipped(tmp_path / "outside/x.zip", "b.jsonl")
    (release / "x.zip").symlink_to(tmp_path / "outside/x.zip")
    with pytest.raises(BadInputError, match=r"x\.zip is a link that leads out of the release"):
        ReleaseFiles(release).text("b.jsonl")


def test_a_release_behind_a_link_is_read_like_any_other(tmp_path):
    write(tmp_path, "there/a.jsonl", "there/images/1.png")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    files = ReleaseFiles(tmp_path / "here")
    assert files.text("a.jsonl") == tmp_path / "here/a.jsonl"
    assert files.pictures("images").read("1.png") == b"there/images/1.png"


def test_a_picture_is_read_from_disk_before_the_archives(tmp_path):
    write(tmp_path, "images/a/1.png")
    zipped(tmp_path / "x.zip", "images/a/1.png", "images/a/2.png")
    folder = ReleaseFiles(tmp_path).pictures("/mnt/images/a")
    assert folder.path == tmp_path / "images/a" and str(folder) == str(tmp_path / "images/a")
    assert folder.read("1.png") == b"images/a/1.png" and folder.read("2.png") == b"images/a/2.png"
    assert folder.size("1.png") == folder.size("2.png") == 14 and folder.size("3.png") == 0
    assert folder.version == str((tmp_path / "x.zip").stat().st_size)
    with pytest.raises(RowError, match=rf"image '3\.png' is not in '{tmp_path}/images/a'"):
        folder.read("3.png")
    again = pickle.loads(pickle.dumps(folder))
    assert (again.root, again.read("2.png")) == ("/mnt/images/a", b"images/a/2.png")
    assert folder.files.pictures("/mnt/images/a") is folder


def test_a_folder_that_is_only_in_an_archive_is_named_as_meta_json_does(tmp_path):
    zipped(tmp_path / "x.zip", "MMPR/images/a/1.png", "MMPR/images/b/2.png")
    folder = ReleaseFiles(tmp_path).pictures("images/a")
    assert folder.path is None and str(folder) == "images/a"
    assert folder.read("1.png") == b"MMPR/images/a/1.png"
    with pytest.raises(RowError, match=r"image '2\.png' is not in 'images/a'"):
        folder.read("2.png")
    nowhere = ReleaseFiles(tmp_path, tmp_path).pictures("images/c")
    with pytest.raises(
        RowError, match=f"image folder 'images/c' does not exist below {tmp_path}, {tmp_path}, nor in a zip"
    ):
        nowhere.read("1.png")
    assert ReleaseFiles(tmp_path).pictures("").prefixes == []


def test_an_image_folder_that_may_be_two_is_refused(tmp_path):
    zipped(tmp_path / "x.zip", "one/images/1.png", "two/images/1.png")
    zipped(tmp_path / "y.zip", "images/2.png")
    with pytest.raises(
        BadInputError, match=r"'images' may be 'one/images' or 'two/images' in .*x\.zip; name one of them"
    ):
        ReleaseFiles(tmp_path).pictures("images").read("1.png")
    assert ReleaseFiles(tmp_path).pictures("two/images").read("1.png") == b"two/images/1.png"


@pytest.mark.parametrize("name", ["", "../1.png", "a/../../1.png", "a\0b", "C:x"])
def test_a_name_that_leads_out_of_its_folder_is_not_looked_for(tmp_path, name):
    write(tmp_path, "1.png", "images/2.png")
    with pytest.raises(RowError, match="leads out of its folder"):
        ReleaseFiles(tmp_path).pictures("images").read(name)


def test_an_absolute_path_stands_for_the_picture_below_the_folder(tmp_path):
    write(tmp_path, "images/a/1.png", "images/1.png", "images/b/2.png", "elsewhere/3.png")
    folder = ReleaseFiles(tmp_path).pictures("images")
    assert folder.below("/mnt/b/2.png") == "b/2.png" and folder.below("/mnt/9.png") == "/mnt/9.png"
    assert folder.below("b/2.png") == "b/2.png"
    there = str(tmp_path / "elsewhere/3.png")
    assert folder.below(there) == there  # it is on this machine
    assert folder.meant("/mnt/b/2.png") == "b/2.png" and folder.meant("/mnt/9.png") == "/mnt/9.png"
    assert folder.read("/mnt/b/2.png") == b"images/b/2.png"
    with pytest.raises(RowError, match=r"image '/x/a/1\.png' may be 'a/1\.png' or '1\.png' here; write its path"):
        folder.meant("/x/a/1.png")
    write(tmp_path, "images/3.png")
    with pytest.raises(RowError, match=r"may be '3\.png' or "):
        folder.meant(there)
    zipped(tmp_path / "x.zip", "pictures/a/4.png")
    packed = ReleaseFiles(tmp_path).pictures("pictures")
    assert packed.meant("/mnt/a/4.png") == "a/4.png" and packed.below("/mnt/a/4.png") == "/mnt/a/4.png"
    write(tmp_path, "pictures/a/4.png")  # unpacked beside its archive: one picture, the disk comes first
    both = ReleaseFiles(tmp_path).pictures("pictures")
    assert both.meant("/mnt/a/4.png") == "a/4.png"


def test_a_file_that_is_far_too_large_is_not_read(tmp_path, monkeypatch):
    assert (module.MAX_FILE_BYTES, module.MAX_PIXELS) == (256 << 20, 178_956_970)  # what messages say
    write(tmp_path, "images/12345678")
    folder = ReleaseFiles(tmp_path).pictures("images")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 15)
    assert folder.read("12345678") == b"images/12345678"
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 14)
    with pytest.raises(RowError, match="has 15 bytes, over the limit of 14"):
        folder.read("12345678")
    zipped(tmp_path / "x.zip", "packed/12345678")
    with pytest.raises(RowError, match=r"image packed/12345678 in .* unpacks to 15 bytes, over the limit of 14"):
        ReleaseFiles(tmp_path).pictures("packed").read("12345678")
    with pytest.raises(RowError, match="is not in"):
        folder.read("x" * 300)  # a name the file system cannot hold


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_a_picture_is_checked_up_to_its_limit(monkeypatch):
    assert module.MAX_PIXELS == 178_956_970  # Pillow's own
    monkeypatch.setattr(module, "MAX_PIXELS", 50)
    for decode in (True, False):
        assert check_picture(png(5, 10), "a", decode=decode) == (5, 10, "PNG")
        with pytest.raises(RowError, match="image 'a' has 51 x 1 pixels, over the limit of 50"):
            check_picture(png(51, 1), "a", decode=decode)
        with pytest.raises(RowError, match="image 'a' cannot be decoded"):
            check_picture(b"no picture", "a", decode=decode)
    content = png(5, 10)
    assert check_picture(content[:45], "a", decode=False) == (5, 10, "PNG")
    with pytest.raises(RowError, match="image 'a' cannot be decoded"):
        check_picture(content[:45], "a", decode=True)


def test_rows_of_a_folder_start_with_nothing_claimed(tmp_path):
    folder = PictureFolder(ReleaseFiles(tmp_path), "images")
    assert folder.annotations == [] and folder.claims == {}
