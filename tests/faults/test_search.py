"""Indexing that is killed at any moment, and goes on."""

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from openblip.cli import main
from openblip.data.sources import list_shards, read_samples
from openblip.hub import load_engine_with_id
from openblip.search.add import SMALL_SEGMENTS
from openblip.search.index import Index
from openblip.search.query import Query, Searcher

pytestmark = pytest.mark.slow

NUM_KILLS = 50
TEXTS = ("a red circle", "a blue square above a green triangle", "two things")


def _index(source: str, index: str, model: str, told: str) -> None:
    """Be `openblip index`, in a process of its own, and add what it says to the file `told`."""
    descriptor = os.open(told, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 2)
    one_by_one = ("--commit-images", "1", "--batch-size", "1")
    sys.argv = ["openblip", "index", source, index, "--model", model, *one_by_one]
    main()


# Forked from a server that has torch already, a command starts at once; so fifty take a minute.
_context = multiprocessing.get_context("forkserver")


def _start(*arguments: Path) -> multiprocessing.process.BaseProcess:
    _context.set_forkserver_preload(["tests.faults.test_search"])
    process = _context.Process(target=_index, args=[str(argument) for argument in arguments])
    process.start()
    return process


def _num_acknowledged(told: Path) -> int:
    text = told.read_text("utf-8") if told.exists() else ""
    return sum(int(number) for number in re.findall(r"committed (\d+) images", text))


def _keys(index: Index) -> list[str]:
    return [index.key(number) for number in range(index.num_rows) if index.is_live[number]]


def _found(folder: Path, model: Path) -> list[dict[str, tuple[float, float | None]]]:
    """Return what every image scores for each text: all of them are asked for."""
    index = Index.open(folder)
    engine, model_id = load_engine_with_id(model)
    searcher = Searcher(engine, index, model_id=model_id)
    found = []
    for text in TEXTS:
        hits = searcher.search(Query(text, limit=len(index), shortlist=16)).hits
        found.append({hit.key: (hit.similarity, hit.match_probability) for hit in hits})
    return found


def test_a_killed_indexing_loses_nothing_that_it_acknowledged(
    world: Path, base: Path, tmp_path: Path
) -> None:
    source, whole, told = world / "web", tmp_path / "whole", tmp_path / "whole.txt"
    keys = [
        sample.key
        for shard in list_shards(source)
        for sample in read_samples(shard, on_bad=lambda key, reason: None)
    ]
    first = _start(source, whole, base, told)
    while not told.exists():
        time.sleep(0.001)
    start = time.monotonic()
    first.join()
    seconds = time.monotonic() - start
    assert first.exitcode == 0
    assert _keys(Index.open(whole)) == keys
    assert _num_acknowledged(told) == len(keys)
    # So many commits that the segments are made one at the end: that is killed too.
    assert len(Index.open(whole).state.segments) == 1 < SMALL_SEGMENTS < len(keys)
    expected = _found(whole, base)

    rng = random.Random(0)
    moments: Counter[str] = Counter()
    attempt = own_kills = 0
    killed, heard = tmp_path / "killed_0", tmp_path / "killed_0.txt"
    num_kills = 0
    while num_kills < NUM_KILLS:
        before = len(Index.open(killed)) if (killed / "index.json").exists() else 0
        size = heard.stat().st_size if heard.exists() else 0
        process = _start(source, killed, base, heard)
        while not heard.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, seconds))
        process.kill()
        process.join()
        own_kills += process.exitcode == -signal.SIGKILL
        num_kills += process.exitcode == -signal.SIGKILL
        num_told = _num_acknowledged(heard)
        if (killed / "index.json").exists():
            held = _keys(Index.open(killed))
            # In the order of the source, each once, and no fewer than was said.
            assert held == keys[: len(held)]
            assert num_told <= len(held) <= num_told + own_kills
            moments["new" if len(held) > before else "nothing new"] += 1
        else:
            assert num_told == 0
            moments["no index yet"] += 1
        if process.exitcode == 0:
            assert heard.stat().st_size > size
            assert _keys(Index.open(killed)) == keys
            _compare(_found(killed, base), expected)
            attempt, own_kills = attempt + 1, 0
            killed, heard = tmp_path / f"killed_{attempt}", tmp_path / f"killed_{attempt}.txt"
    last = _start(source, killed, base, heard)
    last.join()
    assert last.exitcode == 0
    assert _keys(Index.open(killed)) == keys
    _compare(_found(killed, base), expected)
    print(f"{num_kills} kills, {attempt + 1} indexes finished: {dict(moments)}")
    assert moments["new"] >= NUM_KILLS // 10


def _compare(
    found: list[dict[str, tuple[float, float | None]]],
    expected: list[dict[str, tuple[float, float | None]]],
) -> None:
    for own, whole in zip(found, expected, strict=True):
        assert own.keys() == whole.keys()
        for key, (similarity, probability) in own.items():
            assert similarity == pytest.approx(whole[key][0], abs=1e-5)
            assert probability == pytest.approx(whole[key][1], abs=1e-5)
