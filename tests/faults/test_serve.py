"""A server that is loaded, stopped and abused: nothing accepted is lost, and nothing breaks it.

Each server is a process of its own, so that its memory and its exit code are its own too.
"""

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from benchmarks.serve import (
    FIELDS,
    Client,
    Reply,
    Server,
    drawn_pictures,
    form_request,
    put_load,
)
from openblip.checkpoint import save_checkpoint
from openblip.models.blip import Blip
from openblip.pretrain import ModelRecipe
from openblip.tokenizer import Tokenizer
from tests.faults.broken_pictures import broken_pictures

pytestmark = pytest.mark.slow

# Large enough that a batch is worth something, small enough for two cores.
MODEL = ModelRecipe(
    image_size_px=64, patch_size_px=16, vision_width=96, vision_layers=2, vision_heads=4,
    text_width=96, text_layers=2, text_heads=4, ffn_width=256, max_positions=40, embedding_width=32,
    dropout=0.0, init_std=0.1,
)  # fmt: skip
TEXT = "a red blue green small large circle square star above below beside the picture of"

NUM_CLIENTS, LOAD_S, SPEED_UP = 200, 60.0, 3.0
# Those that are accepted wait for at most `max_active` others.
MOST_P99_S = 10.0
# Memory grows over some 12,000 requests, as the allocator's arenas fill, and then no more.
NUM_MALFORMED, NUM_GENERATED, WARM_UP_REQUESTS = 24_000, 4_000, 14_000
MOST_GROWTH_BYTES = 48 << 20
VERBS = ("caption", "match", "embed", "classify", "explain", "search", "ask")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train([TEXT] * 4, vocab_size=120, min_frequency=1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small"
    save_checkpoint(folder, Blip(MODEL.build_config(tokenizer)), tokenizer, "# small\n")
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def captions() -> list[bytes]:
    return [form_request("/v1/caption", FIELDS["caption"], one) for one in drawn_pictures()]


def test_many_clients_get_more_together_than_one_by_one(model: Path, log: Path) -> None:
    with Server(model, log) as server:
        requests = captions()
        asyncio.run(put_load(server, requests, 32, 3.0))
        alone = asyncio.run(put_load(server, requests, 1, LOAD_S / 4))
        together = asyncio.run(put_load(server, requests, NUM_CLIENTS, LOAD_S))
    print(json.dumps([alone.summary(), together.summary()], indent=1))
    assert set(together.statuses) <= {200, 429}
    assert set(alone.statuses) == {200}
    assert together.summary()["p99_s"] < MOST_P99_S
    gain = together.summary()["requests_per_s"] / alone.summary()["requests_per_s"]
    assert gain >= SPEED_UP, gain


def test_a_server_told_to_stop_answers_all_it_accepted(model: Path, log: Path) -> None:
    replies: dict[str, Reply] = {}
    sent_at: dict[str, float] = {}
    told_at = 0.0

    async def ask(server: Server, number: int, pictures: list[bytes]) -> None:
        client = Client(server.host, server.port)
        for turn in range(10_000):
            name = f"{number}-{turn}"
            request = form_request("/v1/caption", (), pictures[turn % len(pictures)], name)
            sent_at[name] = time.monotonic()
            try:
                replies[name] = await client.send(request)
            except (OSError, EOFError):
                return  # it was never accepted, which is checked below
            if replies[name].status == 503:
                client.close()
                return
            if replies[name].status == 429:
                await asyncio.sleep(0.2)

    async def load_and_stop(server: Server) -> None:
        nonlocal told_at
        pictures = drawn_pictures()
        clients = [asyncio.create_task(ask(server, n, pictures)) for n in range(40)]
        await asyncio.sleep(6)
        server.process.send_signal(signal.SIGTERM)
        told_at = time.monotonic()
        await asyncio.gather(*clients)

    with Server(model, log) as server:
        asyncio.run(load_and_stop(server))
        code = server.process.wait(30)
    assert code == 0
    logged = [one for one in map(json.loads, log.read_text().splitlines())
              if one["event"] == "request"]  # fmt: skip
    accepted = {one["request_id"] for one in logged if one["status"] == 200}
    answered = {name for name, reply in replies.items() if reply.status == 200}
    statuses = Counter(one["status"] for one in logged)
    lost = {name for name, at in sent_at.items() if at < told_at - 1 and name not in replies}
    after = sum(1 for name in answered if sent_at[name] < told_at) - sum(
        1 for name in answered if sent_at[name] < told_at - 1
    )
    print(f"{len(answered)} answered, {dict(statuses)} logged, {after} of the last second")
    assert set(statuses) <= {200, 429, 503}
    assert answered
    assert accepted == answered
    assert not lost
    assert all(json.loads(replies[name].body)["captions"] for name in answered)


def test_a_second_signal_ends_it_at_once(model: Path, log: Path) -> None:
    async def hang(server: Server) -> float:
        client = Client(server.host, server.port)
        # The body never comes whole, so the request stays accepted.
        part = form_request("/v1/caption", (), drawn_pictures(1)[0])[:-50]
        waiting = asyncio.create_task(client.send(part))
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        await asyncio.to_thread(server.process.wait, 20)
        seconds = time.monotonic() - start
        # It is told that it failed, or nothing.
        with contextlib.suppress(OSError, EOFError):
            assert (await waiting).status >= 400
        return seconds

    with Server(model, log) as server:
        assert asyncio.run(hang(server)) < 8


def resident_bytes(server: Server) -> int:
    """Return the memory of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def generated(server: Server, mode: GenerationMode, number: int) -> Counter[int]:
    """Send what the OpenAPI allows, or what it does not, to every endpoint -> statuses."""
    url = f"http://{server.host}:{server.port}"
    document: dict[str, Any] = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    operations = [one.ok() for one in schemathesis.openapi.from_dict(document).get_all_operations()]
    statuses: Counter[int] = Counter()
    for operation in operations:

        @settings(
            max_examples=max(1, number // len(operations)),
            database=None,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            response = case.call(base_url=url, timeout=60)
            statuses[response.status_code] += 1
            # 503 would be one that failed; nothing stops this server.
            assert response.status_code < 500, (response.status_code, response.text[:200])

        # A route without fields has no wrong ones.
        with contextlib.suppress(Unsatisfiable):
            send()
    return statuses


def broken_requests() -> Iterator[bytes]:
    """Yield forms without end, with broken and hostile pictures and fields."""
    draw = random.Random(0)
    pictures = broken_pictures(drawn_pictures(4), draw)
    texts = [
        "",
        " ",
        "a red circle",
        "\0",
        "\ud7ff\uffff",
        "a" * 5000,
        "{",
        "{}",
        "%s" * 50,
        "🟥" * 40,
    ]
    names = ("texts", "labels", "text", "question", "prompt", "model", "method", "num_beams",
             "top_p", "max_tokens", "seed", "stream", "where", "limit", "score", "templates", "url",
             "answers", "nonsense")  # fmt: skip
    values = [*texts, "-1", "0", "1e999", "nan", "9" * 400, "true", "beam", "nucleus", "greedy",
              "http://127.0.0.1/", "file:///etc/passwd", "../../etc/passwd"]  # fmt: skip
    good = {"match": [("texts", "a red star")], "classify": [("labels", "a"), ("labels", "b")],
            "explain": [("text", "a red star")], "ask": [("question", "what")]}  # fmt: skip
    while True:
        verb = draw.choice(VERBS)
        fields = list(good.get(verb, []))
        fields += [
            (draw.choice(names), draw.choice(values)) for _ in range(draw.choice((0, 0, 0, 1, 3)))
        ]
        request = form_request(f"/v1/{verb}", fields, next(pictures))
        if draw.random() < 0.1:
            # A form with a bad byte somewhere, of the length that was promised.
            head, _, body = request.partition(b"\r\n\r\n")
            place = draw.randrange(len(body))
            request = head + b"\r\n\r\n" + body[:place] + b"\xff" + body[place + 1 :]
        yield request


async def send_all(server: Server, requests: Iterator[bytes], most: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    left = iter(range(most))

    async def ask() -> None:
        client = Client(server.host, server.port)
        for _ in left:
            reply = await client.send(next(requests))
            statuses[reply.status] += 1
            assert reply.status < 500, reply
            if reply.status >= 400:
                assert set(json.loads(reply.body)["error"]) == {"code", "message", "request_id"}
        client.close()

    await asyncio.gather(*(ask() for _ in range(12)))
    return statuses


def test_what_is_malformed_gets_4xx_and_leaves_nothing(model: Path, log: Path) -> None:
    with Server(model, log) as server:
        requests = broken_requests()
        statuses = asyncio.run(send_all(server, requests, WARM_UP_REQUESTS))
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            statuses += generated(server, mode, NUM_GENERATED // 2)
        warm = resident_bytes(server)
        left = NUM_MALFORMED - sum(statuses.values())
        statuses += asyncio.run(send_all(server, requests, left))
        growth = resident_bytes(server) - warm
        print(f"{dict(sorted(statuses.items()))}, {growth / 2**20:.1f} MiB more of {warm >> 20}")
        assert server.process.poll() is None
    assert sum(statuses.values()) == NUM_MALFORMED
    assert set(statuses) <= {200, 400, 401, 404, 405, 408, 413, 415, 422, 429}
    assert growth < MOST_GROWTH_BYTES
    failed = [line for line in log.read_text().splitlines() if '"exception"' in line]
    assert not failed, failed[0]
