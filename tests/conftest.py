"""One thread, since tiny tensors gain nothing from more; property tests without a clock and with fixed draws."""

import threading

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
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
