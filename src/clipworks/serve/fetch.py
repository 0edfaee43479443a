"""Pictures from addresses, for a service that was told to fetch them, and never from inside the network.

A name is resolved once. If any of its addresses is not a public one, nothing is opened; else the connection
goes to one of exactly these, so that a name that resolves otherwise a moment later gains nothing. Redirects
are followed a few times and checked likewise. Only the ports of HTTP and HTTPS, no proxy, no credentials.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from clipworks.errors import PictureError

PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
_MOVED = (301, 302, 303, 307, 308)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(url: str, *, limit: int, seconds: float = 10.0) -> bytes:
    """What is at an address, at most `limit` bytes within about `seconds`.

    Raises:
        PictureError: if it may not be fetched, or cannot be.
    """
    end = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        parts = _checked(url)
        host, port = str(parts.hostname), PORTS[parts.scheme]
        answer = _get(parts, host, port, _resolved(host, port), limit, end)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise PictureError(f"{_shown(url)}: not fetched, more than {REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, and does not hide one that is not."""
    try:
        ip: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        hidden = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(inner is not None and not is_public(str(inner)) for inner in hidden):
            return False
    # NAT64, behind which a translator reaches any IPv4 address, is among the reserved ones.
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PictureError(f"{_shown(url)}: not an address ({error})") from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise PictureError(f"{_shown(url)}: not fetched, only http and https are")
    if parts.username is not None or parts.password is not None:
        raise PictureError(f"{_shown(parts.hostname)}: not fetched, the address holds credentials")
    if port not in (None, PORTS[parts.scheme]):
        raise PictureError(f"{_shown(url)}: not fetched, only the ports 80 and 443 are")
    return parts


def _resolved(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PictureError(f"{_shown(host)}: not fetched, the name cannot be resolved") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise PictureError(f"{_shown(host)}: not fetched, it is not on the public Internet")
    return addresses


def _get(
    parts: SplitResult, host: str, port: int, addresses: list[str], limit: int, end: float
) -> bytes | str:
    """The body, or where it moved to."""
    connection = http.client.HTTPConnection(host, port)
    try:
        line = socket.create_connection((addresses[0], port), timeout=_left(end))
        if parts.scheme == "https":
            line = ssl.create_default_context().wrap_socket(line, server_hostname=host)
        connection.sock = line
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "clipworks"}
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            if response.status in _MOVED:
                return response.getheader("Location") or ""
            if response.status != 200:
                raise PictureError(f"{_shown(host)}: not fetched, it answered {response.status}")
            data = bytearray()
            while part := response.read1(1 << 16):
                data += part
                if len(data) > limit:
                    raise PictureError(f"{_shown(host)}: not fetched, it is larger than {limit:,} bytes")
                line.settimeout(_left(end))
            return bytes(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "it takes too long" if isinstance(error, TimeoutError) else type(error).__name__
        raise PictureError(f"{_shown(host)}: not fetched, {reason}") from error
    finally:
        connection.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _shown(text: str) -> str:
    plain = "".join(sign if sign.isprintable() else "?" for sign in text)
    return plain if len(plain) <= 80 else f"{plain[:77]}…"
