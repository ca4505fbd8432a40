"""What a server stands under load, against one request at a time through the same server.

    python benchmarks/serve.py MODEL [--clients 1 8 64 200] [--seconds 20] [--verb caption]
                               [--json FILE]

Starts `openblip serve` with MODEL and sends it drawn pictures. A client sends its next request when
it has its answer; one that is told to come back later (429) comes back when it was told to. The
first row is one client, whose requests never meet another: what it gets is what the server does
without batches.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from openblip.cli_output import table
from openblip.data.world import draw_scene, random_scene

FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    "caption": (),
    "match": (("texts", "a red circle above a blue square"),),
    "embed": (),
    "classify": (("labels", "circle"), ("labels", "square")),
}
NUM_PICTURES, SIDE_PX = 32, 64
WARM_UP_S = 3.0


class Server:
    """`openblip serve` as a process; its log goes to a file."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self._log: IO[str] = log.open("w", encoding="utf-8")
        command = [sys.executable, "-m", "openblip", "serve", "--model", str(model), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if (found := re.search(r"http://([^:/]+):(\d+)/", said)) is None:
            self.process.wait()
            raise ValueError(f"the server did not start: {log.read_text('utf-8')[-2000:]}")
        self.host, self.port = found[1], int(found[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


@dataclass(frozen=True)
class Reply:
    """A response: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection, as plain as can be: what the client takes is missing to the server."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, request: bytes) -> Reply:
        """Send a request and read what comes back. Raises OSError, EOFError if nothing does."""
        is_reused = self._writer is not None
        try:
            return await self._exchange(request)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            # A server closes a connection that nobody used for a while, as this one may be.
            if not is_reused or getattr(error, "partial", b""):
                raise
            return await self._exchange(request)

    async def _exchange(self, request: bytes) -> Reply:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        try:
            self._writer.write(request)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in head[1:] if line)
            }
            if headers.get("transfer-encoding") == "chunked":
                body = await _chunks(self._reader)
            else:
                body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        except BaseException:
            self.close()
            raise
        if headers.get("connection") == "close":
            self.close()
        return Reply(int(head[0].split()[1]), headers, body)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """Read a body that comes in chunks, as streams do."""
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return body


def form_request(
    path: str, fields: Sequence[tuple[str, str]], image: bytes | None = None, request_id: str = ""
) -> bytes:
    """Return the bytes of a POST of a form."""
    edge = "----openblip-form-edge"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields
    ]
    if image is not None:
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
        parts.append(head.encode() + image + b"\r\n")
    body = b"".join(parts) + f"--{edge}--\r\n".encode()
    named = f"X-Request-Id: {request_id}\r\n" if request_id else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{named}"
        f"Content-Type: multipart/form-data; boundary={edge}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def drawn_pictures(number: int = NUM_PICTURES) -> list[bytes]:
    """Return drawn scenes as files."""
    rng = np.random.default_rng(0)
    return [draw_scene(random_scene(rng), SIDE_PX, rng) for _ in range(number)]


@dataclass
class Load:
    """What some clients saw: statuses, seconds of the requests that were answered with 200."""

    num_clients: int
    num_seconds: float
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    batch_size: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return the figures of this load."""
        cuts = quantiles(self.seconds, n=100, method="inclusive")
        return {
            "clients": self.num_clients,
            "seconds": round(self.num_seconds, 1),
            "statuses": {str(status): number for status, number in sorted(self.statuses.items())},
            "requests_per_s": round(self.statuses[200] / self.num_seconds, 2),
            "p50_s": round(cuts[49], 4),
            "p99_s": round(cuts[98], 4),
            "mean_batch_size": round(self.batch_size, 2),
        }


async def put_load(
    server: Server, requests: Sequence[bytes], num_clients: int, seconds: float
) -> Load:
    """Let clients send requests for a while; each waits for its answer."""
    draw = random.Random(0)
    before = await _batches(server)
    start = time.monotonic()
    load = Load(num_clients, seconds)

    async def ask() -> None:
        client = Client(server.host, server.port)
        try:
            while time.monotonic() < start + seconds:
                sent = time.monotonic()
                reply = await client.send(draw.choice(requests))
                load.statuses[reply.status] += 1
                if reply.status == 200:
                    load.seconds.append(time.monotonic() - sent)
                elif reply.status == 429:
                    # Not all at the same moment again.
                    await asyncio.sleep(float(reply.headers["retry-after"]) * draw.uniform(1, 1.5))
        finally:
            client.close()

    await asyncio.gather(*(ask() for _ in range(num_clients)))
    load.num_seconds = time.monotonic() - start
    count, total = (now - then for now, then in zip(await _batches(server), before, strict=True))
    load.batch_size = total / count if count else 0.0
    return load


async def _batches(server: Server) -> tuple[float, float]:
    """Return how many batches the models did, and how many requests were in them."""
    client = Client(server.host, server.port)
    reply = await client.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    client.close()

    def added(name: str) -> float:
        pattern = rf"^openblip_batch_size_{name}\{{[^}}]*\}} (\S+)$".encode()
        return sum(float(value) for value in re.findall(pattern, reply.body, re.MULTILINE))

    return added("count"), added("sum")


def measure(
    model: Path, verb: str, clients: Sequence[int], seconds: float, log: Path, *options: str
) -> list[dict[str, Any]]:
    """Put loads on a server, one after the other, and return their figures."""
    requests = [form_request(f"/v1/{verb}", FIELDS[verb], image) for image in drawn_pictures()]
    with Server(model, log, *options) as server:
        asyncio.run(put_load(server, requests, max(clients), WARM_UP_S))
        return [
            asyncio.run(put_load(server, requests, number, seconds)).summary() for number in clients
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 200])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--verb", choices=sorted(FIELDS), default="caption")
    parser.add_argument("--log", type=Path, default=Path("serve.log"), help="of the server")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(
        arguments.model, arguments.verb, arguments.clients, arguments.seconds, arguments.log
    )
    alone = rows[0]["requests_per_s"]
    shown = [
        [
            str(row["clients"]), f"{row['requests_per_s']:.1f}",
            f"{row['requests_per_s'] / alone:.1f}", f"{row['p50_s'] * 1000:.0f}",
            f"{row['p99_s'] * 1000:.0f}", f"{row['mean_batch_size']:.1f}",
            str(row["statuses"].get("429", 0)),
        ]
        for row in rows
    ]  # fmt: skip
    head = ["clients", "requests/s", "times the first", "p50 ms", "p99 ms", "batch", "429"]
    print(table([head, *shown]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"verb": arguments.verb, "loads": rows}, indent=2))


if __name__ == "__main__":
    main()
