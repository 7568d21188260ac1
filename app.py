"""Base and MPO answer the same question side by side, in a browser.

Example (the models that `make quickstart` leaves in outputs/mini need no arguments):

    python app.py
    python app.py --base OpenGVLab/InternVL2-8B --mpo OpenGVLab/InternVL2-8B-MPO
    python app.py --base OpenGVLab/InternVL2-8B --adapter my-org/internvl2-8b-mpo-lora --four_bit
    python app.py --base-url http://localhost:8000/v1 --mpo-url http://localhost:8001/v1

An `app.yaml` beside this file holds the default settings, as in a Space; `--key value` wins over it. docs/demo.md tells
more: the API, the form of the votes, what is stored and what is not.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

try:
    import spaces  # ZeroGPU patches torch, so it must come first
except ImportError:
    spaces = None

from internvl_mpo.demo.backends import make_backend
from internvl_mpo.demo.examples import make_examples
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.demo.sharing import Shelf
from internvl_mpo.demo.votes import VoteBox
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import build_settings, parse_settings, show_settings

DEFAULTS = Path(__file__).with_name("app.yaml")


def read_settings(argv: list[str]) -> DemoSettings:
    """Read the command line, over app.yaml if there is one."""
    if DEFAULTS.is_file() and not any(word.partition("=")[0] == "--config" for word in argv):
        argv = ["--config", str(DEFAULTS), *argv]
    if not argv:
        return build_settings(DemoSettings, {})
    return parse_settings(DemoSettings, argv, program="app.py", about=__doc__)


def main(argv: list[str]) -> int:
    """Serve until interrupted."""
    settings = read_settings(argv)
    print(show_settings(settings, "app.py"), flush=True)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # how containers end; uploads must go then too
    with tempfile.TemporaryDirectory(prefix="internvl-mpo-demo-", ignore_cleanup_errors=True) as folder:
        uploads = Path(folder) / "uploads"  # everything visitors send stays here and goes with the process
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        try:
            from internvl_mpo.demo.page import Page, launch
        except ModuleNotFoundError as error:
            raise BadInputError(f"the demo needs {error.name}; pip install 'internvl-mpo[demo]'") from error
        backend = make_backend(settings)
        if settings.preload or spaces is not None:
            backend.load()
        if spaces is not None:
            backend.stream = on_zero_gpu(backend.stream)
        votes = VoteBox(settings.votes, settings.votes_repo, settings.votes_every)
        shelf = Shelf(settings.shared, settings.shared_days, settings.limits)
        examples = make_examples(Path(folder) / "examples")
        blocks, url = launch(Page(backend, votes, shelf, settings, examples, uploads))
        print(f"the demo is at {url} (Ctrl+C ends it)", flush=True)
        try:
            blocks.block_thread()
        finally:
            votes.flush()
    return 0


def on_zero_gpu(stream):
    """Run a backend's generator in ZeroGPU's worker; that is a fork, so the models need not be sent."""

    @spaces.GPU(duration=120)
    def on_gpu(question):
        yield from stream(question)

    return on_gpu


if __name__ == "__main__":
    sys.exit(run_program(main))
