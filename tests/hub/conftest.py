"""The loopback Hub as a fixture; the client in this process talks to it."""

import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from loopback import WRITER, LoopbackHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[LoopbackHub]:
    """A running Hub without repositories; pauses between attempts are noted in `hub.pauses` instead of waited for."""
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # transformers keeps one client for the whole process, which would go on asking the Hub of an earlier test
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
        server.pauses = []
        monkeypatch.setattr(time, "sleep", server.pauses.append)
        yield server
