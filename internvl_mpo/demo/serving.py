"""What Gradio's server holds for each caller, and where it listens."""

import socket
from typing import Any

MOST_SESSIONS = 1000  # pages that are remembered; Gradio keeps 100 KB for each, and 10,000 of them unless told


def forget_call(request: Any) -> None:
    """Drop the session that Gradio made for one call of the API: else a thousand calls leave 100 MB.

    Args:
        request: a `gradio.Request`, or None outside a running app.
    """
    if request is not None and request.session_hash is not None:
        request.request.app.state_holder.session_data.pop(request.session_hash, None)


def free_port(host: str) -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
