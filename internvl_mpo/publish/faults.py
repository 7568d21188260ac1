"""What went wrong on the way to the Hub, in one sentence, and whether another try is any use."""

import errno
from collections.abc import Iterator
from typing import Any, NamedTuple

LONGEST_WAIT = 300  # seconds; a server that asks for more is asked again by the user
DISK_FULL = "the disk is full; free some space and run the same command again"
_NO_ROOM = ("storage", "quota", "limit reached")  # how the Hub words it


class Fault(NamedTuple):
    """A diagnosis.

    Attributes:
        reason: one sentence without its full stop.
        wait: seconds before another try, 0 for the usual pause, None if another try is no use.
        no_answer: the connection ended, so the request may or may not have been carried out.
    """

    reason: str
    wait: float | None
    no_answer: bool = False


def diagnose(error: BaseException, repository: str) -> Fault:
    """Read an exception of huggingface_hub, its HTTP client, hf_xet or the operating system.

    Args:
        error: what was raised while `repository` was read or written.
        repository: owner/name.
    """
    chain = list(_chain(error))
    if any(is_disk_full(one) for one in chain):
        return Fault(DISK_FULL, None)
    for one in chain:
        response = getattr(one, "response", None)
        if response is not None:
            return _of_status(response, repository)
    text = " ".join(str(error).split())
    if any(isinstance(one, (ConnectionError, TimeoutError)) or _is_of_client(one) for one in chain):
        return Fault(f"the connection to the Hub broke ({type(error).__name__})", 0, no_answer=True)
    if isinstance(error, RuntimeError):  # what hf_xet raises
        return Fault(f"the upload broke off: {text}", 0)
    return Fault(f"{repository} was not written: {text}", None)


def is_disk_full(error: BaseException) -> bool:
    """safetensors and pyarrow raise their own kinds, with the number of the system's error in the text."""
    texts = ("No space left on device", "StorageFull", "code: 28")
    return getattr(error, "errno", None) == errno.ENOSPC or any(text in str(error) for text in texts)


def _of_status(response: Any, repository: str) -> Fault:
    status, said = response.status_code, response.headers.get("X-Error-Message") or ""
    if status in (402, 403, 413, 507) and any(word in said.lower() for word in _NO_ROOM):
        reason = f"the Hub has no room left: {said}; free some, then run the same command, finished uploads are kept"
        return Fault(reason, None)
    if status == 401:
        return Fault("the Hub does not accept the token; run `hf auth login`, or set HF_TOKEN to a valid one", None)
    if status == 403:
        reason = f"the token may not write to {repository} ({said or 'forbidden'}); use one that may, or --create_pr"
        return Fault(reason, None)
    if status == 404:
        return Fault(f"{repository} is not there, or the token may not see it", None)
    if status in (409, 412):
        reason = f"somebody else changed {repository} during the upload; look at it, then run the same command again"
        return Fault(reason, None)
    if status == 429:
        asked = response.headers.get("Retry-After") or ""
        seconds = float(asked) if asked.isdigit() else 0.0
        if seconds > LONGEST_WAIT:
            return Fault(f"the Hub asks to wait {seconds:.0f} s; run the same command again after that", None)
        return Fault("the Hub asks for fewer requests (429)", seconds)
    if status == 408 or status >= 500:
        return Fault(f"the Hub failed (status {status})", 0)
    return Fault(f"the Hub refuses {repository}: {said or f'status {status}'}", None)


def _is_of_client(error: BaseException) -> bool:
    """huggingface_hub 1 speaks through httpx, 2 through httpx2."""
    return any(kind.__module__.split(".")[0] in ("httpx", "httpx2") for kind in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
