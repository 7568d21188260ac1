"""A Space holds what its app imports and nothing else, pins what it needs, and is started before it is pushed."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceCard
from loopback import LoopbackHub

from internvl_mpo.errors import BadInputError
from internvl_mpo.publish.__main__ import main
from internvl_mpo.publish.space import needed_by, pin

MODELS = ("--base", "ada/base", "--mpo", "ada/mpo")
# Stands in for the demo: a page, an address on the standard output, the endpoint that is asked for.
APP = """
import http.server, json, sys
from internvl_mpo.helper import name

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"named_endpoints": {"/compare": {}}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Page)
print(f"{name()} is at http://127.0.0.1:{server.server_address[1]}", flush=True)
server.serve_forever()
"""
HELPER = """
from internvl_mpo.deep import rooms

def name():
    import yaml
    return "demo"
"""
ROOMS = """
from .more import x
try:
    import surely_not_installed
except ImportError:
    pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with an app, what it needs, and what it does not."""
    root = tmp_path / "checkout"
    files = {
        "app.py": APP,
        "internvl_mpo/__init__.py": "",
        "internvl_mpo/helper.py": HELPER,
        "internvl_mpo/deep/__init__.py": "",
        "internvl_mpo/deep/rooms.py": ROOMS,
        "internvl_mpo/deep/more.py": "x = 1\n",
        "internvl_mpo/deep/style.css": "a {}\n",
        "internvl_mpo/deep/.env": "TOKEN=1\n",
        "internvl_mpo/deep/.tokens.json": "{}\n",
        "internvl_mpo/deep/notes.ipynb": "{}\n",
        "internvl_mpo/deep/run.log": "done\n",
        "internvl_mpo/training.py": "import deepspeed\n",
        "train_mpo.py": "import internvl_mpo.training\n",
        "LICENSE": "MIT\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


NEEDED = {
    *("internvl_mpo/__init__.py", "internvl_mpo/helper.py", "internvl_mpo/deep/__init__.py"),
    *("internvl_mpo/deep/rooms.py", "internvl_mpo/deep/more.py", "internvl_mpo/deep/style.css"),
}


def publish(source: Path, output: Path, *options: str) -> int:
    return main(["space", str(source), "--output", str(output), *MODELS, "--environment", "borrowed", *options])


def test_only_what_the_app_imports_comes_along(checkout: Path) -> None:
    ours, others = needed_by(checkout / "app.py", checkout)
    assert {path.relative_to(checkout).as_posix() for path in ours} == {"app.py", *NEEDED}
    assert others == {"yaml"}


def test_a_space_is_built_from_an_installed_wheel_too(checkout: Path, tmp_path: Path, monkeypatch) -> None:
    """There the program lies inside the package: `site-packages/internvl_mpo/checkout/app.py`."""
    home = checkout / "internvl_mpo" / "checkout"
    (home / "configs").mkdir(parents=True)
    for name in ("app.py", "train_mpo.py", "LICENSE"):
        (checkout / name).rename(home / name)
    (home / "configs" / "mini.yaml").write_text("seed: 1\n")
    monkeypatch.setattr("internvl_mpo.publish.space.PACKAGES", checkout)
    assert publish(home, tmp_path / "built", "--skip_start") == 0
    built = {path.relative_to(tmp_path / "built").as_posix() for path in (tmp_path / "built").rglob("*.*")}
    assert built == {"app.py", "app.yaml", "README.md", "requirements.txt", *NEEDED}
    assert (tmp_path / "built" / "LICENSE").is_file()


def test_requirements_name_versions_that_pypi_has() -> None:
    lines = pin({"yaml", "torch", "PIL"})
    assert f"pyyaml=={importlib.metadata.version('pyyaml')}" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no +cpu
    with pytest.raises(BadInputError, match="the version of 'surely_not_installed' is not known"):
        pin({"surely_not_installed"})


@pytest.mark.slow
def test_started_then_pushed(hub: LoopbackHub, checkout: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import threading

    monkeypatch.setattr("time.sleep", lambda seconds: threading.Event().wait(seconds))  # the app needs its time
    assert publish(checkout, tmp_path / "built", "--push", "ada/demo", "--votes_repo", "ada/votes") == 0
    assert "started in a borrowed environment, page after" in capsys.readouterr().out
    repository = hub.repository("spaces", "ada/demo")
    assert repository.sdk == "gradio"
    assert {"app.py", "app.yaml", "README.md", "requirements.txt", "internvl_mpo/deep/style.css"} <= repository.paths()
    card = SpaceCard.load(tmp_path / "built/README.md").data.to_dict()
    assert card["sdk_version"] == importlib.metadata.version("gradio")
    assert (card["app_file"], card["models"], card["datasets"]) == ("app.py", ["ada/base", "ada/mpo"], ["ada/votes"])
    settings = yaml.safe_load((tmp_path / "built/app.yaml").read_text())
    assert settings == {
        "base": "ada/base",
        "mpo": "ada/mpo",
        "votes_repo": "ada/votes",
        "host": "0.0.0.0",
        "port": 7860,
    }


@pytest.mark.slow
def test_an_app_that_does_not_start_is_not_pushed(hub: LoopbackHub, checkout: Path, tmp_path: Path) -> None:
    (checkout / "internvl_mpo/deep/more.py").write_text("raise RuntimeError('no luck')\n")
    with pytest.raises(BadInputError, match="ended with code 1 in an environment of its own: RuntimeError: no luck"):
        publish(checkout, tmp_path / "built", "--push", "ada/demo")
    assert not hub.repositories
    assert not (tmp_path / "built").exists()


def test_a_borrowed_environment_does_not_borrow_the_repository(tmp_path: Path) -> None:
    import subprocess

    from internvl_mpo.publish.space_start import _make_environment

    python = _make_environment(tmp_path / "venv", tmp_path / "requirements.txt", clean=False)
    code = "import importlib.util as u; print(bool(u.find_spec('yaml')), bool(u.find_spec('internvl_mpo')))"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mpo", "ada/mpo", "--adapter", "ada/adapter"], "give --mpo OWNER/NAME, or --adapter"),
        (["--adapter", "./adapter"], "a Space reads its models from the Hub"),
        (["--mpo", "ada/mpo", "--push", "ada/demo", "--skip_start"], "a Space that was not started is not pushed"),
    ],
)
def test_impossible_requests_are_refused(checkout: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        main(["space", str(checkout), "--output", str(tmp_path / "built"), "--base", "ada/base", *options])
    with pytest.raises(BadInputError, match=r"holds no app.py"):
        publish(tmp_path, tmp_path / "built", "--skip_start")
