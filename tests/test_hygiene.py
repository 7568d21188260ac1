"""Every kind of secret, path and name that must not be published, at its shortest; and what only looks like one."""

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.publish import hygiene
from internvl_mpo.publish.hygiene import check_nothing_private

# In halves, so that this file does not look like a leak itself: (begin, shortest rest).
SECRETS = {
    "Hugging Face": ("hf_", "aB3" * 5 + "x"),
    "OpenAI": ("sk-", "a1B2_" * 4),
    **{f"GitHub {kind}": (f"gh{kind}_", "c3D4e" * 6) for kind in "pousr"},
    "AWS": ("AKIA", "A1B2" * 4),
    "GitLab": ("glpat-", "x9_Y" * 4),
    **{f"Slack {kind}": (f"xox{kind}-", "123456789-") for kind in "abp"},
    "private key": ("-----BEGIN PRIVATE", " KEY-----"),
    "private key of a kind": ("-----BEGIN RSA PRIVATE", " KEY-----"),
}
FOLDERS = (
    *("home", "root", "Users", "mnt", "tmp", "data", "work", "workspace", "scratch", "var", "opt", "private", "nfs"),
    *("gpfs", "lustre", "fsx", "srv", "media", "content"),
)


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """No name, folder or secret of this computer gets in the way."""
    monkeypatch.setattr(hygiene, "_private_words", lambda owner: {})


def found_in(folder: Path, content: str | bytes, name: str = "notes.md") -> str | None:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        check_nothing_private(folder)
    except BadInputError as error:
        return str(error)
    finally:
        path.unlink()
    return None


@pytest.mark.parametrize("kind", SECRETS)
def test_the_shortest_secret_of_each_kind_is_found_and_nothing_shorter(tmp_path, kind):
    begin, rest = SECRETS[kind]
    for content in (begin + rest, f"key={begin}{rest}\n", f'"{begin}{rest}"'):
        assert "looks like a secret key" in found_in(tmp_path, content)
        assert rest not in found_in(tmp_path, content)
    assert found_in(tmp_path, begin + rest[:-1]) is None
    if begin[0] != "-":
        assert found_in(tmp_path, f"word{begin}{rest}") is None  # inside a word


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_of_a_computer_is_an_absolute_path(tmp_path, folder):
    assert f"absolute path '/{folder}/x'" in found_in(tmp_path, f"see /{folder}/x")
    assert "absolute path" in found_in(tmp_path, f'{{"root": "/{folder}/x/y"}}', "a.json")
    for other in (f"a/{folder}/x", f"../{folder}/x", f"https://x.org/{folder}/x", f"~/{folder}/x", f"/{folder}s/x"):
        assert found_in(tmp_path, other) is None
    for suffix in ("py", "js", "css"):  # the same on every computer
        assert found_in(tmp_path, f"open('/{folder}/x')", f"code.{suffix}") is None
    for suffix in ("png", "jpg", "jpeg", "webp", "gif", "bmp", "ico", "model"):
        assert found_in(tmp_path, b"\x00/%b/x" % folder.encode(), f"a.{suffix}") is None


def test_a_windows_folder_is_an_absolute_path(tmp_path):
    assert "absolute path" in found_in(tmp_path, r"in D:\Users\zeb")
    assert found_in(tmp_path, r"in D:\files") is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_key_between_zeros_is_found_behind_any_mark(tmp_path, encoding):
    secret = "".join(SECRETS["AWS"])
    assert "secret key" in found_in(tmp_path, f"a line\n{secret}\n".encode(encoding), "a.txt")
    for mark in (b"\xff\xfe", b"\xfe\xff", b""):  # half a character at the end hides nothing
        form = "utf-16-be" if mark == b"\xfe\xff" else "utf-16-le"
        text = f"a line\n{secret}\n".encode(form)
        assert "secret key" in found_in(tmp_path, mark + text + b"\x00", "a.txt")
        beside = f"{'好' * 50} {secret}"  # few zeros: the mark alone tells
        assert not mark or "secret key" in found_in(tmp_path, mark + beside.encode(form), "a.txt")
    mostly = "a" * 6 + "好" * 4  # six in ten are plain: still a text of one byte a character
    assert hygiene._as_utf_8(mostly.encode("utf-16-le")) == mostly.encode("utf-16-le")
    plain = b"plain text"
    assert hygiene._as_utf_8(plain) is plain
    assert hygiene._as_utf_8(b"") == b""


def test_of_weights_the_header_is_read_and_of_parquet_texts_and_metadata(tmp_path):
    secret = "".join(SECRETS["GitLab"])
    header = json.dumps({"__metadata__": {"note": secret}}).encode()
    assert "secret" in found_in(tmp_path, struct.pack("<Q", len(header)) + header, "a.safetensors")
    inside = struct.pack("<Q", 2) + b"{}" + secret.encode()  # numbers that happen to spell something
    assert found_in(tmp_path, inside, "a.safetensors") is None

    def parquet(**columns) -> bytes:
        table = pa.table({name: pa.array([value]) for name, value in columns.items()})
        pq.write_table(table, tmp_path / "x")
        content = (tmp_path / "x").read_bytes()
        (tmp_path / "x").unlink()
        return content

    assert "secret" in found_in(tmp_path, parquet(question=secret), "a.parquet")
    assert "secret" in found_in(tmp_path, parquet(other=1, last=["a", secret]), "a.parquet")
    assert found_in(tmp_path, parquet(picture=secret.encode()), "a.parquet") is None
    assert found_in(tmp_path, parquet(question="what is in /home/zeb?"), "a.parquet") is None
    for name in ("image_path", "image_root", "provenance", "image"):
        assert f"column '{name}' of a.parquet" in found_in(tmp_path, parquet(**{name: "/home/zeb"}), "a.parquet")
    marked = pa.table({"n": [1]}).replace_schema_metadata({"note": secret})
    pq.write_table(marked, tmp_path / "b.parquet")
    with pytest.raises(BadInputError, match="secret"):
        check_nothing_private(tmp_path)


@pytest.fixture
def words(monkeypatch):
    """What `_private_words` says of a made-up computer."""
    monkeypatch.undo()

    def of(owner=None, *, user="zebediah", host="calculon-7", home="/home/zebediah", cwd="/x/run", token=None, **keys):
        for key in hygiene._KEYS:
            monkeypatch.delenv(key, raising=False)
        for key, value in keys.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
        monkeypatch.setattr(hygiene.Path, "home", classmethod(lambda cls: Path(home)))
        monkeypatch.setattr(hygiene.Path, "cwd", classmethod(lambda cls: Path(cwd)))
        monkeypatch.setattr(hygiene.getpass, "getuser", lambda: user)
        monkeypatch.setattr(hygiene.socket, "gethostname", lambda: host)
        found = hygiene._private_words(owner)
        return lambda text: [what for what, pattern in found.items() if pattern.search(text.encode())]

    return of


SECRET, PATH, NAME = "a secret of this session", "a path of this computer", "the name of its user or computer"


@pytest.mark.parametrize(
    "key",
    ["HF_TOKEN", "OPENAI_API_KEY", "JUDGE_API_KEY", "MODEL_API_KEY", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"],
)
def test_what_a_variable_of_the_session_holds_is_a_secret(words, key):
    assert words(**{key: "p.ss(ord"})("x p.ss(ord x") == [SECRET]
    assert words(**{key: "p.ss(ord"})("x passwords x") == []
    assert words(**{key: "1234567"})("x 1234567 x") == []  # too short to be one: "changeme" would be found everywhere
    assert words(token="abcdefgh")("abcdefgh") == [SECRET]


def test_names_and_folders_of_this_computer_are_found_as_words(words):
    find = words()
    assert find("by zebediah") == [NAME] and find("on calculon-7.") == [NAME]
    assert find("zebediahs") == [] and find("xcalculon-7") == []
    assert find("in /home/zebediah/x") == [PATH, NAME]
    assert find("in /x/run") == [PATH]
    assert words("zebediah")("by zebediah") == []  # the owner on the Hub may well be called so
    for name in (
        "root",
        "user",
        "admin",
        "ubuntu",
        "runner",
        "jovyan",
        "docker",
        "nobody",
        "localhost",
        "debian",
        "work",
    ):
        assert words(user=name, host=name)(f"by {name}") == []
    assert words(user="zeb", host="abc")("zeb abc") == []  # three letters are everywhere
    assert words(user="zebe", host="abcd")("zebe") == [NAME]
    assert words(home="/root", cwd="/")("in /root/x") == []
    assert words(home="/root", cwd="/root/a")("in /root/a") == [PATH]


def test_a_user_without_a_name_is_none(words, monkeypatch):
    find = words()

    def nameless() -> str:
        raise KeyError

    monkeypatch.setattr(hygiene.getpass, "getuser", nameless)
    assert "the name of its user or computer" in hygiene._private_words(None)
    assert find("x") == []


def test_what_was_found_is_shown_unless_it_is_a_secret(tmp_path, monkeypatch):
    import re

    monkeypatch.setattr(
        hygiene, "_private_words", lambda owner: {NAME: re.compile(b"zeb."), SECRET: re.compile(b"abc")}
    )
    assert found_in(tmp_path, "by zeb\xff".encode("latin-1")).endswith(
        f"holds {NAME} ('zeb\ufffd'); it is not published"
    )
    assert found_in(tmp_path, "x abc").endswith(f"notes.md holds {SECRET}; it is not published")
    assert found_in(tmp_path, "nobody") is None
