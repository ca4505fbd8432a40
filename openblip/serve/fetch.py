"""Pictures by URL, where a server allows it: from public addresses alone.

A name is looked up once, and the address that was checked is the one that is connected to: a name
server that answers otherwise a moment later changes nothing. Every redirect passes the same way.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import urljoin, urlsplit

from openblip.serve.errors import RequestError

MOST_REDIRECTS = 3
TIMEOUT_S = 10.0
_PORTS = {"http": 80, "https": 443}
_CHUNK = 1 << 16
_WRAPPING = [
    ipaddress.ip_network("::/96"),
    ipaddress.ip_network("::ffff:0:0/96"),
    ipaddress.ip_network("64:ff9b::/96"),
    ipaddress.ip_network("64:ff9b:1::/48"),
    ipaddress.ip_network("2001::/32"),
    ipaddress.ip_network("2002::/16"),
]
"""Addresses with one of IPv4 in them, which a network may take apart again."""


def fetch(url: str, max_bytes: int) -> bytes:
    """Return what lies at a URL. Raises RequestError if it may not, or cannot, be fetched."""
    deadline = time.monotonic() + TIMEOUT_S
    for _ in range(1 + MOST_REDIRECTS):
        try:
            answer = _get(url, max_bytes, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refusal(f"the picture could not be fetched: {type(error).__name__}") from error
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise _refusal(f"more than {MOST_REDIRECTS} redirects")


def public_address(host: str, port: int) -> str:
    """Look a host up, and return its address. Raises RequestError unless all it has are public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        within = any(ip in network for network in _WRAPPING)
        if not ip.is_global or ip.is_multicast or within:
            raise _refusal("the URL leads to an address that is not public")
    return addresses[0]


def _get(url: str, max_bytes: int, deadline: float) -> bytes | str:
    """Return a body, or the address that a redirect leads to."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
        raise _refusal("a picture's URL is http:// or https://, with a host and no user name")
    port = parts.port or _PORTS[parts.scheme]
    address = public_address(parts.hostname, port)
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=left)
    # The connection is made here, to the address that was checked; the name is for TLS and `Host`.
    plain = socket.create_connection((address, port), timeout=left)
    connection.sock = used = plain
    late = None
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection.sock = used = context.wrap_socket(plain, server_hostname=parts.hostname)
        # Who sends a byte now and then never runs into the time limit of a single read.
        late = threading.Timer(max(0.0, deadline - time.monotonic()), _end, [used])
        late.daemon = True
        late.start()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "openblip", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.getheader("Location") or ""
        if response.status != 200:
            raise _refusal(f"the picture's server answered {response.status}")
        return _body(response, max_bytes, deadline)
    finally:
        if late is not None:
            late.cancel()
        connection.close()


def _end(connection: socket.socket) -> None:
    """End what is read from a connection in another thread."""
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise RequestError(413, "too_large", f"the picture is larger than {max_bytes} bytes")
    if time.monotonic() > deadline:
        raise TimeoutError
    return bytes(data)


def _refusal(message: str) -> RequestError:
    return RequestError(422, "bad_url", message)
