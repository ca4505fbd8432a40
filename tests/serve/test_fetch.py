"""Pictures by URL: from public addresses alone, whatever names and redirects say."""

import contextlib
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from openblip.serve import fetch as fetching
from openblip.serve.errors import RequestError
from openblip.serve.fetch import fetch, public_address


@pytest.fixture
def site() -> Iterator[str]:
    """Serve `/picture`, `/large`, `/loop` and redirects on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            if self.path == "/loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
                self.end_headers()
                return
            if self.path in ("/slow-head", "/slow-body"):
                self.wfile.write(b"HTTP/1.0 200 OK\r\n")
                if self.path == "/slow-body":
                    self.wfile.write(b"\r\n")
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        time.sleep(0.05)
                        self.wfile.write(b"x")
                return
            if self.path == "/absent":
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * (1000 if self.path == "/large" else 10))

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://site.test:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def names(monkeypatch) -> dict[str, list[str]]:
    """Let names lead where a test wants; a name with several answers gives them in turn."""
    known = {"site.test": ["127.0.0.1"]}

    def look_up(host: str, port: int, *_: object, **__: object) -> list[object]:
        answers = known.get(host, [host])
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", look_up)
    return known


@pytest.fixture
def is_public_here(monkeypatch, names) -> None:
    """Take this machine for a public place, so that the rest can be tried."""
    original = public_address

    def taken(host: str, port: int) -> str:
        return "127.0.0.1" if host == "site.test" else original(host, port)

    monkeypatch.setattr(fetching, "public_address", taken)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
     "100.64.0.1", "224.0.0.1", "::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1",
     "::ffff:10.0.0.1", "255.255.255.255", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"],
)  # fmt: skip
def test_no_address_that_is_not_public(names, address) -> None:
    names["inner.test"] = [address]
    with pytest.raises(RequestError, match="not public"):
        fetch("http://inner.test/picture", 100)


def test_a_public_address_is_the_one_that_is_connected_to(names, monkeypatch) -> None:
    # The name leads elsewhere a moment later; nobody asks it again.
    names["turning.test"] = ["93.184.216.34", "127.0.0.1"]
    connected: list[object] = []

    def connect(address: object, timeout: float) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(fetching.socket, "create_connection", connect)
    with pytest.raises(RequestError, match="could not be fetched"):
        fetch("http://turning.test/picture", 100)
    assert connected == [("93.184.216.34", 80)]


def test_a_picture_is_fetched(site, is_public_here) -> None:
    assert fetch(f"{site}/picture", 100) == b"x" * 10
    assert fetch(f"{site}/to//picture", 100) == b"x" * 10


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:1/x", "http://169.254.169.254/latest", "http://[::1]/"]
)
def test_a_redirect_into_the_house_is_refused(site, is_public_here, target) -> None:
    with pytest.raises(RequestError, match="not public"):
        fetch(f"{site}/to/{target}", 100)


@pytest.mark.parametrize(
    ("path", "told"),
    [("/large", "larger than 100 bytes"), ("/loop", "more than 3 redirects"),
     ("/absent", "answered 404"), ("/to/file:///etc/passwd", "is http:// or https://")],
)  # fmt: skip
def test_what_cannot_be_fetched_is_told(site, is_public_here, path, told) -> None:
    with pytest.raises(RequestError, match=told):
        fetch(f"{site}{path}", 100)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a.test/x", "http://", "//a", "http://me:you@a.test/x",
            "gopher://a", "http://a.test:99999999/"],
)  # fmt: skip
def test_other_urls_are_none(names, url) -> None:
    with pytest.raises(RequestError):
        fetch(url, 100)


def test_a_server_that_may_fetch_does(serve, picture, monkeypatch) -> None:
    monkeypatch.setattr("openblip.serve.app.fetch", lambda url, max_bytes: picture)
    server = serve(may_fetch=True)
    by_url = server.post("embed", url="https://example.org/a.jpg").json()
    assert by_url == server.post("embed", picture).json()
    both = server.post("embed", picture, url="https://example.org/a.jpg")
    assert "not both" in both.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_a_site_that_drips_is_left_in_time(site, is_public_here, monkeypatch, path) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(RequestError, match="could not be fetched"):
        fetch(site + path, 1000)
    assert time.monotonic() - start < 3
