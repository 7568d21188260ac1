"""One thread, since tiny tensors gain nothing from more; property tests without a clock and with fixed draws."""

import threading
from socketserver import BaseServer

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")


@pytest.fixture
def serve():
    """Starts a server in a thread, and ends it with the test."""
    servers = []

    def start(server):
        servers.append(server)
        looks = {"poll_interval": 0.01} if isinstance(server, BaseServer) else {}  # half a second each otherwise
        threading.Thread(target=server.serve_forever, kwargs=looks, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
