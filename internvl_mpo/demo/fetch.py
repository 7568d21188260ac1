"""A picture from a public web address: nothing of this network is reached, and nobody waits long for it.

The name is looked up once, every address it has must be public, and the connection goes to the address that was looked
at; so it is for each redirect. One deadline covers the lookup, the connection, the headers and the body.
"""

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx

from internvl_mpo.errors import BadInputError

DEADLINE_SECONDS = 15.0
MAX_REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(url: str, max_bytes: int) -> bytes:
    """Return the body of a public http(s) address.

    Args:
        url: where it is.
        max_bytes: longest body; no more than that is read.

    Raises:
        BadInputError: it is not public, too slow, too large, compressed, or not there.
    """
    pool = ThreadPoolExecutor(
        2
    )  # one for an event loop of its own; a lookup cannot be interrupted, nobody waits for it

    def fetch_in_time() -> bytes:
        return asyncio.run(asyncio.wait_for(_fetch(url, max_bytes, pool), DEADLINE_SECONDS))

    try:
        return pool.submit(fetch_in_time).result()
    except TimeoutError as error:
        raise BadInputError(f"{url} gave no picture within {DEADLINE_SECONDS:g} seconds") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ExceptionGroup) as error:  # a port of 99999
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"{url} could not be fetched") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


async def _fetch(url: str, max_bytes: int, pool: ThreadPoolExecutor) -> bytes:
    address = httpx.URL(url)
    for _ in range(MAX_REDIRECTS + 1):
        if address.scheme not in ("http", "https") or not address.host:
            raise BadInputError(f"{address} is no http(s) address")
        host = await asyncio.get_running_loop().run_in_executor(pool, public_host, address.host)
        answer = await _get(address, host, max_bytes)
        if isinstance(answer, bytes):
            return answer
        address = address.join(answer)
    raise BadInputError(f"{url} leads on to more than {MAX_REDIRECTS} other addresses")


async def _get(address: httpx.URL, host: str, max_bytes: int) -> bytes | str:
    """Return the body, or the address it leads on to."""
    headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
    async with (
        httpx.AsyncClient(transport=_To(host), trust_env=False, timeout=DEADLINE_SECONDS) as client,
        client.stream("GET", address, headers=headers) as response,
    ):
        if response.is_redirect:
            return response.headers["Location"]
        if response.status_code != 200:
            raise BadInputError(f"{address} answers {response.status_code}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BadInputError(f"{address} sends the picture compressed, which a picture is already")
        body = bytearray()
        async for part in response.aiter_raw():
            body += part
            if len(body) > max_bytes:
                raise BadInputError(f"{address} is larger than {max_bytes / 2**20:g} MB")
        return bytes(body)


class _To(httpx.AsyncHTTPTransport):
    """Connects to one address, whatever name the request has; certificates are checked against the name."""

    def __init__(self, host: str):
        super().__init__()
        self._host = host

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": request.url.host}
        request.url = request.url.copy_with(host=self._host)
        return await super().handle_async_request(request)


def public_host(name: str) -> str:
    """Return an address of a host.

    Raises:
        BadInputError: one of its addresses is not public.
        OSError: it has none.
    """
    found = [info[4][0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    for address in found:
        if not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise BadInputError(f"{name} is not a public address")
    return found[0]


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public network; an IPv4 address inside an IPv6 one must, too."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64 or int(address) < 1 << 32:  # the second form is IPv4-compatible, long abandoned
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = [one for one in inner if one is not None]
        if inner:
            return all(map(is_public, inner))
    return address.is_global and not address.is_multicast
