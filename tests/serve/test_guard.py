"""What a request must pass: size, time, tokens, rates, numbers; and what is noted of it."""

import io
import json
import logging
import re
import socket
import struct
import threading
import time
import zlib

import pytest
from PIL import Image

from openblip.serve.guard import Buckets
from openblip.serve.settings import ServerSettings
from tests.serve.conftest import encoded

TOKENS = ("first-token-of-sixteen", "second-token-of-sixteen")


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG whose head promises more pixels than there are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def polyglot(picture: bytes) -> bytes:
    return b"<script>alert(1)</script>" + picture


HOSTILE = {
    "bomb": (png_that_claims(60_000, 60_000), 413, "too_many_pixels"),
    "larger than allowed": (png_that_claims(1001, 1000), 413, "too_many_pixels"),
    "truncated": (encoded(40, 40, "JPEG")[:-200], 422, "bad_image"),
    "head alone": (encoded(40, 40)[:24], 422, "bad_image"),
    "no pixels": (png_that_claims(100, 100), 422, "bad_image"),
    "empty": (b"", 422, "bad_image"),
    "text": (b"not a picture", 415, "unsupported_format"),
    "pdf": (b"%PDF-1.7\n", 415, "unsupported_format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_format"),
    "polyglot": (polyglot(encoded(8, 8)), 415, "unsupported_format"),
    "another format in disguise": (b"RIFF" + encoded(8, 8), 422, "bad_image"),
    "tiff": (encoded(8, 8, "TIFF"), 415, "unsupported_format"),
    "ico": (encoded(16, 16, "ICO"), 415, "unsupported_format"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused(running, name) -> None:
    data, status, code = HOSTILE[name]
    response = running.post("caption", data)
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"].startswith(code)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_all_kinds_that_are_allowed_are_taken(running, kind) -> None:
    assert running.post("embed", encoded(40, 30, kind)).status_code == 200


def test_a_picture_with_a_file_behind_it_is_taken_as_the_picture(running) -> None:
    assert running.post("embed", encoded(8, 8) + b"PK\x03\x04 an archive").status_code == 200


def test_a_large_body_is_refused_before_it_is_read(running) -> None:
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_say_how_large_it_is_is_counted(running) -> None:
    def body():
        yield b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
        for _ in range(10):
            yield b"0" * 50_000

    response = running.client.post(
        "/v1/caption", content=body(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


def test_huge_headers_and_broken_bodies_are_refused(running) -> None:
    # The server may hang up before the client has sent all: then there is no answer to look at.
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 40_000)
        try:
            answer = connection.recv(4096)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    for content, kind in (
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"\xff" * 100, "multipart/form-data"),
        (b"texts=a", "application/x-www-form-urlencoded"),
        (b'{"texts": ["a"]}', "application/json"),
    ):
        response = running.client.post("/v1/match", content=content, headers={"Content-Type": kind})
        assert 400 <= response.status_code < 500, (kind, response.text)
        assert response.json()["error"]["message"]
    assert running.client.get("/healthz").json() == {"status": "ok"}


def test_a_slow_body_is_not_waited_for(serve) -> None:
    server = serve(upload_timeout_s=0.3)
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_token_is_needed_where_there_are_some(serve, picture) -> None:
    server = serve(tokens=TOKENS)
    refused = server.post("embed", texts=["a"])
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/v1/runs"):
        assert server.client.get(path).status_code == 401
    for path in ("/", "/healthz", "/readyz"):
        assert server.client.get(path).status_code == 200
    for given, status in (
        (f"Bearer {TOKENS[1]}", 200),
        (f"bearer {TOKENS[0]}", 200),
        (f"Bearer {TOKENS[0]}x", 401),
        ("Bearer", 401),
        (TOKENS[0], 401),
        ("Bearer \xff", 401),
    ):
        response = server.client.get(
            "/v1/models", headers={"Authorization": given.encode("latin1")}
        )
        assert response.status_code == status, given


def test_a_client_has_a_rate(serve) -> None:
    server = serve(requests_per_s=0.01, burst=2)
    codes = [server.post("embed", texts=["a"]).status_code for _ in range(4)]
    assert codes == [200, 200, 429, 429]
    refused = server.post("embed", texts=["a"])
    assert refused.json()["error"]["code"] == "rate_limited"
    assert int(refused.headers["retry-after"]) > 50
    assert server.client.get("/v1/models").status_code == 200


def test_a_client_is_who_connects_whatever_he_says(serve) -> None:
    server = serve(requests_per_s=0.01, burst=1)
    codes = [
        server.client.post(
            "/v1/embed", data={"texts": "a"}, headers={"X-Forwarded-For": f"203.0.113.{n}"}
        ).status_code
        for n in range(3)
    ]
    assert codes == [200, 429, 429]


def test_a_stream_that_fails_says_so(running, picture, monkeypatch, caplog) -> None:
    from openblip.serve import works

    def fail(self: object, engine: object, items: object) -> None:
        raise RuntimeError("the inner reason")

    monkeypatch.setattr(works.CaptionWork, "__call__", fail)
    response = running.post("caption", picture, stream="true")
    assert response.text.startswith("event: error\n")
    assert '"code": "internal"' in response.text
    assert "inner" not in response.text
    assert "the inner reason" in caplog.text


def test_buckets_fill_again() -> None:
    buckets = Buckets(per_s=2, burst=3)
    assert [buckets.wait_s("a", 0.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    assert buckets.wait_s("b", 0.0) == 0
    assert buckets.wait_s("a", 0.5) == 0
    assert buckets.wait_s("a", 0.5) == pytest.approx(0.5)
    assert [buckets.wait_s("a", 100.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]


def test_more_requests_than_allowed_are_asked_to_come_back(serve, picture, engine) -> None:
    server = serve(max_active=2)
    hold = _hold(server)
    threads = [threading.Thread(target=lambda: server.post("embed", texts=["a"])) for _ in range(2)]
    for thread in threads:
        thread.start()
    _wait_until(lambda: server.guard.num_active == 2)
    refused = server.post("embed", texts=["a"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
    assert int(refused.headers["retry-after"]) >= 1
    hold.set()
    for thread in threads:
        thread.join()
    assert server.post("embed", texts=["a"]).status_code == 200


def test_an_answer_that_takes_too_long_is_not_waited_for(serve, picture) -> None:
    server = serve(answer_timeout_s=0.2)
    hold = _hold(server)
    late = server.post("embed", texts=["a"])
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    hold.set()
    assert server.post("embed", texts=["a"]).status_code == 200


def test_who_leaves_takes_his_work_back(serve) -> None:
    server = serve()
    hold = _hold(server)
    workers = [model.worker for model in server.app.state.service.models]
    port = int(server.url.rpartition(":")[2])
    body = b"--x\r\nContent-Disposition: form-data; name=texts\r\n\r\nred\r\n--x--\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            b"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" % len(body) + body
        )
        _wait_until(lambda: len(workers[0]) == 1)
    _wait_until(lambda: server.guard.num_active == 0)
    [job] = workers[0]._waiting
    assert job.future.cancelled()
    hold.set()


def test_a_caption_that_nobody_follows_ends(serve, picture, monkeypatch) -> None:
    from openblip.serve.works import WordFollower

    server = serve()
    left = threading.Event()
    leave = WordFollower.leave
    monkeypatch.setattr(WordFollower, "leave", lambda self: (leave(self), left.set()))
    hold = _hold(server)
    with server.client.stream(
        "POST", "/v1/caption", files={"image": picture}, data={"stream": "true"}
    ):
        assert not left.is_set()
    assert left.wait(10)
    hold.set()


def test_other_sites_may_ask_only_where_it_is_said(running, serve) -> None:
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert (
        "access-control-allow-origin"
        not in running.client.options("/v1/caption", headers=asked).headers
    )
    server = serve(origins=("https://example.org",), tokens=TOKENS)
    allowed = server.client.options("/v1/caption", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    refused = server.client.post("/v1/caption", headers={"Origin": "https://example.org"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://example.org"
    assert "Retry-After" in refused.headers["access-control-expose-headers"]
    other = server.client.options("/v1/caption", headers=asked | {"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers


def test_a_request_keeps_the_id_that_it_came_with(running) -> None:
    given = running.client.get("/healthz", headers={"X-Request-Id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    for odd in ("a b", "x" * 65, "<script>"):
        made = running.client.get("/healthz", headers={"X-Request-Id": odd})
        assert re.fullmatch(r"[0-9a-f]{32}", made.headers["x-request-id"])


def test_what_is_logged_tells_nothing_of_pictures_or_texts(running, picture, caplog) -> None:
    caplog.set_level(logging.INFO, "openblip.serve.requests")
    running.post("match", picture, texts=["a secret thought"])
    running.client.get("/v1/pictures/1/7")
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["route"] for line in lines] == ["/v1/match", "/v1/pictures/{generation}/{number}"]
    assert lines[0]["status"] == 200
    assert len(lines[0]["request_id"]) == 32
    assert "secret" not in caplog.text


def test_a_failure_of_ours_is_logged_and_not_shown(running, picture, monkeypatch, caplog) -> None:
    from openblip.serve import works

    def fail(self: object, engine: object, items: object) -> None:
        raise RuntimeError("the inner reason")

    monkeypatch.setattr(works.MatchWork, "__call__", fail)
    response = running.post("match", picture, texts=["a"])
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "inner" not in response.text
    assert "the inner reason" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


def test_metrics_count(serve) -> None:
    server = serve()
    server.post("embed", texts=["a"])
    server.post("embed")
    figures = server.client.get("/metrics").text
    assert 'openblip_requests_total{route="/v1/embed",status="200"} 1.0' in figures
    assert 'openblip_requests_total{route="/v1/embed",status="422"} 1.0' in figures
    assert 'openblip_batch_size_count{kind="embed_texts",model="tiny"} 1.0' in figures
    assert 'openblip_waiting_jobs{model="tiny"} 0.0' in figures


def test_settings_out_of_range_are_told() -> None:
    with pytest.raises(ValueError, match="max_active 0"):
        ServerSettings(max_active=0)
    with pytest.raises(ValueError, match="requests_per_s"):
        ServerSettings(requests_per_s=-1)
    with pytest.raises(ValueError, match="shorter than 16"):
        ServerSettings(tokens=("short",))


def test_exif_turns_a_picture(running, engine) -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    said = running.post("embed", buffer.getvalue()).json()["image_embedding"]
    assert said == pytest.approx(engine.embed_images([buffer.getvalue()])[0].tolist(), abs=1e-5)


class _Holding:
    """Work that waits until it is let go."""

    kind = "holding"

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, engine: object, items: list[object]) -> list[object]:
        self._event.wait(30)
        return items


def _hold(server) -> threading.Event:
    """Keep all models busy until the event that comes back is set."""
    event = threading.Event()
    workers = [model.worker for model in server.app.state.service.models]
    for worker in workers:
        worker.submit(_Holding(event), None)
    _wait_until(lambda: not any(map(len, workers)))
    return event


def _wait_until(is_true, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
