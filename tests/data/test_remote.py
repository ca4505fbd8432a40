import errno
import io
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from openblip.data import remote
from openblip.data.remote import RemoteAbsentError, RemoteError, local_copy, read_remote

if TYPE_CHECKING:
    from tests.conftest import FailingServer

BODY = bytes(range(256)) * 100


def fetch(url: str) -> bytes:
    with local_copy(url) as path:
        return path.read_bytes()


def files_of(cache: Path) -> list[str]:
    return sorted(p.name.partition("-")[2] for p in cache.iterdir() if p.stat().st_size)


def test_a_file_is_fetched_once(server: "FailingServer", cache: Path) -> None:
    (server.folder / "0.tar").write_bytes(BODY)
    for _ in range(3):
        assert fetch(f"{server.url}/0.tar") == BODY
    assert server.requests == {"0.tar": 1}
    assert files_of(cache) == ["0.tar"]
    server.close()
    assert fetch(f"{server.url}/0.tar") == BODY


@pytest.mark.parametrize("failure", [500, 503, 429, "cut", "hang up"])
def test_what_fails_for_a_while_is_tried_again(server: "FailingServer", failure: int | str) -> None:
    (server.folder / "0.tar").write_bytes(BODY)
    server.failures["0.tar"] = [failure, failure]
    assert fetch(f"{server.url}/0.tar") == BODY
    assert server.requests == {"0.tar": 3}


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_cut_body_goes_on_where_it_broke_off(server: "FailingServer", has_ranges: bool) -> None:
    (server.folder / "0.tar").write_bytes(BODY)
    server.has_ranges = has_ranges
    server.failures["0.tar"] = ["cut", 500, "cut"]
    assert fetch(f"{server.url}/0.tar") == BODY
    first = len(BODY) // 2
    assert server.ranges[:2] == [f"bytes={first}-"] * 2
    second = first + (len(BODY) - first) // 2 if has_ranges else first
    assert server.ranges[2:] == [f"bytes={second}-"]


def test_a_file_that_changes_meanwhile_is_fetched_anew(
    server: "FailingServer", monkeypatch: pytest.MonkeyPatch
) -> None:
    path = server.folder / "0.tar"
    path.write_bytes(BODY)
    server.failures["0.tar"] = ["cut"]
    monkeypatch.setattr(remote.time, "sleep", lambda s: path.write_bytes(BODY[::-1]))
    assert fetch(f"{server.url}/0.tar") == BODY[::-1]


def test_what_stays_away_is_told_with_address_attempts_and_cause(
    server: "FailingServer", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "0.tar").write_bytes(BODY)
    server.failures["0.tar"] = [503] * 6
    with pytest.raises(RemoteError, match=r"0\.tar could not be fetched in 6 attempts; .*503"):
        fetch(f"{server.url}/0.tar")
    server.failures["0.tar"] = ["cut"] * 6
    server.has_ranges = False
    with pytest.raises(RemoteError, match=r"6 attempts; .*12800 of 25600 bytes came"):
        fetch(f"{server.url}/0.tar")
    monkeypatch.setenv("OPENBLIP_REMOTE_ATTEMPTS", "2")
    server.close()
    with pytest.raises(RemoteError, match=r"2 attempts; .*refused"):
        fetch(f"{server.url}/0.tar")
    assert files_of(cache) == []
    monkeypatch.setenv("OPENBLIP_REMOTE_ATTEMPTS", "many")
    with pytest.raises(ValueError, match="OPENBLIP_REMOTE_ATTEMPTS is 'many'"):
        fetch(f"{server.url}/0.tar")


@pytest.mark.parametrize("status", [404, 403])
def test_what_is_absent_or_forbidden_is_told_at_once(server: "FailingServer", status: int) -> None:
    server.failures["0.tar"] = [status]
    kind = RemoteAbsentError if status == 404 else RemoteError
    with pytest.raises(kind, match=rf"0\.tar.*{status}"):
        fetch(f"{server.url}/0.tar")
    assert server.requests == {"0.tar": 1}


def test_what_was_used_longest_ago_goes_first_and_nothing_in_use(
    server: "FailingServer", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLIP_CACHE_GB", str(3.5 * len(BODY) / 1e9))
    names = [f"{number}.tar" for number in range(6)]
    for name in names:
        (server.folder / name).write_bytes(BODY)
    with local_copy(f"{server.url}/0.tar") as held:
        for name in ("1.tar", "2.tar", "1.tar", "3.tar"):
            fetch(f"{server.url}/{name}")
        assert files_of(cache) == ["0.tar", "1.tar", "3.tar"]
        fetch(f"{server.url}/4.tar")
        assert files_of(cache) == ["0.tar", "3.tar", "4.tar"]
        assert held.read_bytes() == BODY
    fetch(f"{server.url}/5.tar")
    assert len(files_of(cache)) == 3
    # A file that is larger than the whole cache can be read all the same.
    monkeypatch.setenv("OPENBLIP_CACHE_GB", "1e-9")
    assert fetch(f"{server.url}/1.tar") == BODY
    assert files_of(cache) == ["1.tar"]


def fetch_all(url: str, results: "multiprocessing.Queue[bool]") -> None:
    good = all(fetch(f"{url}/{number}.tar") == BODY for number in [0, 1, 2, 0, 1, 2, 2, 1, 0])
    results.put(good)


def test_several_processes_share_a_cache_that_is_too_small(
    server: "FailingServer", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLIP_CACHE_GB", str(1.5 * len(BODY) / 1e9))
    for number in range(3):
        (server.folder / f"{number}.tar").write_bytes(BODY)
        server.failures[f"{number}.tar"] = ["cut", 500]
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bool] = context.Queue()
    processes = [context.Process(target=fetch_all, args=(server.url, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True] * 3
    for process in processes:
        process.join()
    assert not [name for name in files_of(cache) if name.endswith(".part")]


def test_what_a_killed_process_left_is_removed_and_fetched_anew(
    server: "FailingServer", cache: Path
) -> None:
    (server.folder / "0.tar").write_bytes(BODY)
    fetch(f"{server.url}/0.tar")
    [path] = [path for path in cache.iterdir() if path.stat().st_size]
    path.rename(path.with_name(f"{path.name}.part"))
    assert fetch(f"{server.url}/0.tar") == BODY
    assert files_of(cache) == ["0.tar"]


class FullDisk(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_no_fault_of_the_server(server: "FailingServer") -> None:
    (server.folder / "0.tar").write_bytes(BODY)
    with pytest.raises(OSError, match="No space left"):
        remote._download(f"{server.url}/0.tar", FullDisk(), lambda num_bytes: None)
    assert server.requests == {"0.tar": 1}


def test_other_schemes_go_through_fsspec(cache: Path) -> None:
    files = fsspec.filesystem("memory")
    for name in ("b.tar", "a.tar", "note.txt"):
        files.pipe(f"/bucket/{name}", BODY)
    assert fetch("memory://bucket/a.tar") == BODY
    assert read_remote("memory://bucket/b.tar") == BODY
    assert remote.list_remote("memory://bucket", (".tar",)) == [
        "memory://bucket/a.tar",
        "memory://bucket/b.tar",
    ]
    with pytest.raises(RemoteAbsentError, match=r"memory://bucket/c\.tar: there is no such file"):
        fetch("memory://bucket/c.tar")
    with pytest.raises(RemoteError, match=r"nothing://bucket/c\.tar"):
        fetch("nothing://bucket/c.tar")


def test_a_folder_over_http_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\{00000\.\.00099\}"):
        remote.list_remote("http://host/shards", (".tar",))
