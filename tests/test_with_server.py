"""Servers around a program: started, waited for, looked at before a reply is taken, and never left behind."""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_world import make_model_folder

from internvl_mpo.engines.http_engine import HttpEngine
from internvl_mpo.engines.internvl_engine import InternVLEngine
from internvl_mpo.engines.revision import model_revision, why_other
from internvl_mpo.engines.serve import BatchServer
from internvl_mpo.engines.with_server import main, server_command
from internvl_mpo.errors import BadInputError, run_program

# lists one model, whose name is its argument, and writes down its process id
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": sys.argv[1]}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
print(os.getpid(), os.environ.get("REPLICA", ""), flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path) -> str:
    (tmp_path / "server.py").write_text(SERVER, encoding="utf-8")
    return f"REPLICA={{replica}} {sys.executable} {tmp_path / 'server.py'} {{model}} {{port}}"


def run(server: str, folder: Path, *command: str, **settings) -> int:
    values = {"serve": server, "model": "m", "log": folder / "log", **settings}
    words = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return run_program(main, [*words, "--", *command])


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "(zombie)" not in status.read_text(encoding="utf-8")


def pids(folder: Path) -> list[list[str]]:
    return [path.read_text(encoding="utf-8").split() for path in sorted(folder.glob("log.*.log"))]


def test_a_program_runs_beside_servers_that_answer_and_end_with_it(server, tmp_path):
    code = "import sys, urllib.request as u; print([u.urlopen(a + '/models').read() for a in sys.argv[1].split(',')])"
    out = tmp_path / "out"
    program = f"{code}; open({str(out)!r}, 'w').write(sys.argv[1]); sys.exit(7)"
    assert run(server, tmp_path, sys.executable, "-c", program, "{base_url}", replicas=2) == 7
    assert len(out.read_text(encoding="utf-8").split(",")) == 2
    found = pids(tmp_path)
    assert [replica for _, replica in found] == ["0", "1"]
    assert not any(is_running(int(pid)) for pid, _ in found)


def test_a_server_that_ends_at_once_is_named_with_its_last_words(tmp_path, capsys):
    failing = f"{sys.executable} -c \"raise SystemExit('no memory')\" {{model}} {{port}}"
    assert run(failing, tmp_path, "true") == 2
    error = capsys.readouterr().err
    assert "no memory" in error
    assert "ended with exit code 1 before it answered" in error


def test_a_server_that_never_answers_is_stopped(tmp_path, capsys):
    silent = (
        f'{sys.executable} -c "import os, time; print(os.getpid(), 0, flush=True); time.sleep(60)" {{model}} {{port}}'
    )
    assert run(silent, tmp_path, "true", seconds=1.0) == 2
    assert "did not answer in time" in capsys.readouterr().err
    assert not any(is_running(int(pid)) for pid, _ in pids(tmp_path))


@pytest.mark.parametrize(
    ("template", "message"),
    [("vllm serve {model}", "with {model} and {port}"), ("A={model} B={port}", "starts nothing"),
     ("serve '{model} {port}", "no command"), ("/no/such/program {model} {port}", "cannot start")],
)  # fmt: skip
def test_a_template_that_cannot_work_is_refused(template, message, tmp_path, capsys):
    assert run(template, tmp_path, "true") == 2
    assert message in capsys.readouterr().err


def test_a_program_is_needed(server, tmp_path, capsys):
    assert run_program(main, ["--serve", server, "--model", "m", "--log", str(tmp_path / "log")]) == 2
    assert "no program to run" in capsys.readouterr().err


def test_a_model_with_blanks_and_braces_in_its_name_stays_one_word():
    words, environment = server_command(
        "A=1 serve {model} --port={port} {other}", model="my {port} model", port=5, replica=0
    )
    assert words == ["serve", "my {port} model", "--port=5", "{other}"]
    assert environment == {"A": "1"}


def test_a_terminated_program_leaves_no_server(server, tmp_path):
    command = [sys.executable, "-m", "internvl_mpo.engines.with_server", "--serve", server, "--model", "m"]
    waits = [sys.executable, "-c", f"import time; open({str(tmp_path / 'up')!r}, 'w'); time.sleep(60)"]
    process = subprocess.Popen([*command, "--log", str(tmp_path / "log"), "--", *waits], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + 15
    assert not any(is_running(int(pid)) for pid, _ in pids(tmp_path))


# --- the right model --------------------------------------------------------------------------------------------------


class Lists(ThreadingHTTPServer):
    """Lists one model."""

    daemon_threads = True

    def __init__(self, **entry: str):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps({"data": [entry]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    make_model_folder(folder / "old")
    make_model_folder(folder / "new")
    config = folder / "new" / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + " ", encoding="utf-8")
    return folder / "old", folder / "new"


def test_a_server_with_another_revision_is_refused_before_it_is_asked(serve, models):
    old, new = models
    server = serve(Lists(id="policy", root=str(new), revision=model_revision(str(old))))
    with pytest.raises(BadInputError, match=rf"has loaded revision \w+, not \w+, and {new} is to answer"):
        HttpEngine(server.url, "policy", served_from=str(new))
    assert HttpEngine(server.url, "policy", served_from=str(old)).revision == model_revision(str(old))


def test_our_own_server_tells_what_it_has_loaded(serve, models):
    old, new = models
    server = serve(BatchServer(InternVLEngine(old), "policy"))
    assert HttpEngine(server.url, "policy", served_from=str(old)).revision == model_revision(str(old))
    with pytest.raises(BadInputError, match="has loaded revision"):
        HttpEngine(server.url, "policy", served_from=str(new))


def test_every_one_of_several_servers_is_looked_at(serve, models):
    old, new = models
    right, wrong = (serve(Lists(id="policy", root=str(model))) for model in (new, old))
    with pytest.raises(BadInputError, match=f"{wrong.url} has loaded '{old}'"):
        HttpEngine([right.url, wrong.url], "policy", served_from=str(new))


def test_a_folder_is_the_same_however_its_path_is_spelled(models, monkeypatch):
    monkeypatch.chdir(models[0].parent)
    assert why_other({"id": "policy", "root": str(models[0])}, "./old") == ""
    assert why_other({"id": "old"}, "old") == ""
    assert why_other({"id": "old"}, "new") == "'old'"
    assert why_other({"id": "me/model"}, "me/model") == ""
