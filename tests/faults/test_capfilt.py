"""CapFilt whose workers, driver or whole job are killed, whose disk is full, whose data are bad."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from openblip.captions import clean_caption
from openblip.checkpoint import save_checkpoint
from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import WorldConfig, draw_world
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from tests.cli.conftest import MODEL

if TYPE_CHECKING:
    from tests.conftest import FailingServer

pytestmark = pytest.mark.slow

NUM_SHARDS, SAMPLES_PER_SHARD = 200, 6
NUM_KILLS = 50
OPTIONS = (
    "--threads", "1", "--workers", "2", "--set", "captions_per_image=4",
    "--set", "keep.threshold=0.3", "--set", "decoding.max_tokens=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a web of 200 shards, a captioner and a filter."""
    import torch

    folder = tmp_path_factory.mktemp("capfilt")
    num = NUM_SHARDS * SAMPLES_PER_SHARD
    draw_world(WorldConfig(num_web=num, num_human=4, num_test=2), folder / "world")
    samples = [
        sample
        for shard in list_shards(folder / "world" / "web")
        for sample in read_samples(shard, on_bad=lambda key, reason: pytest.fail(reason))
    ]
    texts = [clean_caption(c.text) for sample in samples for c in sample.captions]
    tokenizer = Tokenizer.train(texts, vocab_size=120, min_frequency=1)
    for number in range(NUM_SHARDS):
        with ShardWriter(folder / "web" / f"{number:05d}.tar") as writer:
            for sample in samples[number * SAMPLES_PER_SHARD : (number + 1) * SAMPLES_PER_SHARD]:
                writer.write(sample)
    for seed, name in enumerate(("captioner", "filter")):
        torch.manual_seed(seed)
        model = Blip(MODEL.build_config(tokenizer))
        save_checkpoint(folder / name, model, tokenizer, "# tiny\n")
    return folder


def start(root: Path, source: object, out: Path, *options: str) -> subprocess.Popen[str]:
    models = ["--captioner", str(root / "captioner"), "--filter", str(root / "filter")]
    arguments = ["-m", "openblip", "capfilt", "run", str(source), str(out), *models, *options]
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def held(folder: Path) -> dict[str, object]:
    """Return all that CapFilt left, but for times; the reports tell speeds."""
    result: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("report."):
            continue
        result[path.name] = path.read_bytes()
        if path.suffix == ".json":
            manifest = json.loads(path.read_bytes())
            del manifest["seconds"]
            result[path.name] = manifest
    return result


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> dict[str, object]:
    process = start(root, root / "web", root / "whole", *OPTIONS)
    assert process.wait() == 0
    result = held(root / "whole")
    assert len(result) == 3 * NUM_SHARDS
    return result


def workers_of(driver: subprocess.Popen[str]) -> list[int]:
    """Return the processes that hold the models."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            group = os.getsid(int(path.name))
        except OSError:
            continue
        if b"spawn_main" in command and group == driver.pid:
            found.append(int(path.name))
        # Ray renames its actors, and gives them sessions of their own.
        if command.startswith(b"ray::RayWorker"):
            found.append(int(path.name))
    return found


@pytest.mark.parametrize("engine", ["pool", "ray"])
def test_killed_at_random_moments_it_ends_as_undisturbed(
    engine: str, root: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    """Workers, the driver alone, and the driver with its workers die, 50 times in all."""
    rng = random.Random(engine)
    out = tmp_path / "out"
    kills = {"worker": 0, "driver": 0, "job": 0}
    process = None
    for number in range(NUM_KILLS):
        num_done = number * (NUM_SHARDS - 5) // NUM_KILLS
        kind = rng.choices([*kills], [0.6, 0.2, 0.2])[0]
        if process is None:
            process = start(root, root / "web", out, *OPTIONS, "--engine", engine)
        while len(list(out.glob("*.json"))) < num_done or not workers_of(process):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.2))
        workers = workers_of(process)
        if kind == "worker" and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        else:
            if kind == "job":
                for pid in workers:
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            process = None
        kills[kind] += 1
    process = process or start(root, root / "web", out, *OPTIONS, "--engine", engine)
    _, err = process.communicate()
    if process.returncode:  # five deaths over one unit are too many: another run does it
        assert "its worker died 5 times" in err, err
        process = start(root, root / "web", out, *OPTIONS, "--engine", engine)
        _, err = process.communicate()
    assert process.returncode == 0, err
    print(f"{engine}: {kills}, {NUM_SHARDS} shards")
    assert held(out) == undisturbed


def test_damaged_data_cost_their_samples_and_are_counted(root: Path, tmp_path: Path) -> None:
    web = tmp_path / "web"
    web.mkdir()
    good = (root / "web" / "00000.tar").read_bytes()
    (web / "00000.tar").write_bytes(good)
    (web / "cut.tar").write_bytes(good[: len(good) // 2 + 100])
    (web / "noise.tar").write_bytes(random.Random(1).randbytes(5000))
    damaged = bytearray(good)
    with tarfile.open(root / "web" / "00000.tar") as tar:
        image = next(member for member in tar if member.name.endswith(".jpg"))
    damaged[image.offset_data : image.offset_data + 200] = bytes(200)
    (web / "damaged.tar").write_bytes(damaged)
    process = start(root, web, tmp_path / "out")
    _, err = process.communicate()
    assert process.returncode == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_shards"] == 4
    assert report["bad"]["truncated_tar"] == 1
    assert report["bad"]["unreadable_tar"] == 1
    assert report["bad"]["not_an_image"] == 1
    lost = sum(report["bad"].values())
    assert lost == sum(
        len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("*.failed.jsonl")
    )


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_done(
    root: Path, tmp_path: Path
) -> None:
    web = tmp_path / "web"
    web.mkdir()
    (web / "a.parquet").write_bytes(b"PAR1 no parquet PAR1")
    (web / "b.tar").write_bytes((root / "web" / "00000.tar").read_bytes())
    (web / "c.jsonl").write_text('{"key": "x", "image": "absent.jpg", "text": "a cat"}\n')
    process = start(root, f"{web}/{{a.parquet,b.tar,c.jsonl}}", tmp_path / "out")
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert "not done: a: cannot read shard" in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bad"] == {"missing_image": 1}
    assert report["num_images"] == SAMPLES_PER_SHARD


@pytest.mark.parametrize("engine", ["local", "pool"])
def test_a_full_disk_stops_with_a_sentence_and_goes_on_when_there_is_room(
    engine: str, root: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={16 * 2**20}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(16 * 2**20 - 400 * 2**10))
        process = start(root, root / "web", disk / "out", *OPTIONS, "--engine", engine)
        _, err = process.communicate()
        assert process.returncode == 2, err
        assert "No space left on device" in err.splitlines()[-1]
        assert "Traceback" not in err
        ballast.unlink()
        process = start(root, root / "web", disk / "out", *OPTIONS, "--engine", engine)
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert held(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_server_that_is_away_for_a_while_is_waited_for(
    root: Path, server: "FailingServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("00000.tar", "00001.tar"):
        (server.folder / name).write_bytes((root / "web" / name).read_bytes())
    monkeypatch.setenv("OPENBLIP_CACHE", str(tmp_path / "cache"))
    server.num_left = 1  # the second shard meets a server that is gone
    process = start(root, f"{server.url}/{{00000..00001}}.tar", tmp_path / "out", *OPTIONS)
    while server.requests.total() < 4:
        assert process.poll() is None
        time.sleep(0.05)
    server.num_left = None
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "trying again" in err
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "whole" / name).read_bytes()
