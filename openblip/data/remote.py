"""Remote files: fetched whole into a bounded local cache, or read into memory.

`http://` and `https://` go through the standard library, every other scheme (`s3://`, `gs://`,
`hf://`) through fsspec. A transient error is tried again, each time after twice the wait, and goes
on where the last attempt broke off if the server can do that. A body that is shorter than announced
is such an error. What is absent or forbidden is told at once.

The cache is safe for several processes: a file appears under its name when it is whole, its reader
holds a lock, and what was used longest ago goes first. A file is taken as it was first fetched:
data that change need another name, or an empty cache.

Environment:
OPENBLIP_CACHE            folder of the cache; without it, `openblip` in the user's cache folder
OPENBLIP_CACHE_GB         its size, 50; files that are in use may exceed it
OPENBLIP_REMOTE_ATTEMPTS  before a file counts as unreachable, 6, which takes 16 seconds and more
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

Result = TypeVar("Result")

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 30.0
MAX_BYTES_IN_MEMORY = 1 << 30
"""More is no photo."""

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_TRANSIENT_STATUS = frozenset({408, 425, 429})
_OWN_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})

_log = logging.getLogger(__name__)


class RemoteError(ValueError):
    """A remote file that cannot be had; the message names it, the attempts and the cause."""


class RemoteAbsentError(RemoteError):
    """The server answers, and has no such file."""


class _TruncatedError(Exception):
    """A body that is shorter than announced."""


def is_remote(address: str) -> bool:
    """Say whether an address is a URL, not a path."""
    return _SCHEME.match(address) is not None


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Give a local file with the content of `url`; it stays for as long as the context is open.

    Raises RemoteError if it cannot be fetched.
    """
    folder = _cache_folder()
    digest = hashlib.blake2b(url.encode(), digest_size=12).hexdigest()
    path = folder / f"{digest}-{PurePosixPath(urlsplit(url).path).name[-100:]}"
    file = _hold(path)
    while file is None:
        # One process fetches; the others wait for it. Few lock files serve all addresses.
        with (folder / f"lock-{digest[:2]}").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = _hold(path) or _fetch(url, path)
    with file:
        # Finer than the clock of the file system, so that the order of use is kept.
        os.utime(path, ns=(time.time_ns(),) * 2)
        yield path


def read_remote(url: str) -> bytes:
    """Read a small remote file, past the cache. Raises RemoteError if it cannot be had."""
    buffer = io.BytesIO()

    def refuse_more(num_bytes: int) -> None:
        if num_bytes > MAX_BYTES_IN_MEMORY:
            raise RemoteError(f"{url} has {num_bytes} bytes, more than {MAX_BYTES_IN_MEMORY}")

    _download(url, buffer, refuse_more)
    return buffer.getvalue()


def list_remote(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the addresses of the files of a remote folder that end so, in order.

    Raises RemoteError if the folder cannot be read, ValueError for http, which has no folders.
    """
    if url.startswith(("http://", "https://")):
        raise ValueError(
            f"{url}: the files of a folder cannot be listed over http; name them, as in "
            "http://host/shards/{00000..00099}.tar"
        )
    scheme = url.partition("://")[0]

    def names() -> list[str]:
        files, folder = _filesystem(url)
        return [str(name) for name in files.ls(folder, detail=False)]

    found = _tried(url, names)
    return sorted(f"{scheme}://{name.lstrip('/')}" for name in found if name.endswith(suffixes))


def _cache_folder() -> Path:
    given = os.environ.get("OPENBLIP_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given) if given else Path(home, "openblip")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _setting(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"{name} is {text!r}; it must be a number above 0")
    return value


def _hold(path: Path) -> IO[bytes] | None:
    """Open a cached file so that nobody removes it; None if it is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    return _shared(file)


def _shared(file: IO[bytes]) -> IO[bytes] | None:
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()  # removed before it was locked
    return None


def _fetch(url: str, path: Path) -> IO[bytes] | None:
    """Fetch into the cache and return the open file, locked; None if it was removed at once."""
    part = path.with_name(f"{path.name}.part")
    file = part.open("w+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        _download(url, file, lambda num_bytes: _make_room(path.parent, num_bytes))
        file.flush()
        part.replace(path)
    except BaseException:
        file.close()
        part.unlink(missing_ok=True)
        raise
    return _shared(file)


def _make_room(folder: Path, num_bytes: int) -> None:
    """Remove what was used longest ago until `num_bytes` more fit, but for what is in use."""
    bound = _setting("OPENBLIP_CACHE_GB", 50) * 1e9
    found: list[tuple[int, int, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size, path))
    total = sum(size for _, size, _ in found) + num_bytes
    for _, size, path in sorted(found):
        if total <= bound:
            break
        if size and not path.name.startswith("lock-") and _remove_unused(path):
            total -= size


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def _download(url: str, file: IO[bytes], on_length: Callable[[int], None]) -> None:
    """Write the content of `url` into an empty file; `on_length` hears how much it will be."""
    transfer = _Http(url) if url.startswith(("http://", "https://")) else _Filesystem(url)
    _tried(url, lambda: transfer.go_on(file, on_length))


def _tried(url: str, work: Callable[[], Result]) -> Result:
    """Do work that may fail for a while. Raises RemoteError when it must not be tried again."""
    attempts = round(_setting("OPENBLIP_REMOTE_ATTEMPTS", 6))
    delay_s = FIRST_DELAY_S
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except RemoteError:
            raise
        except FileNotFoundError as error:
            raise RemoteAbsentError(f"{url}: there is no such file") from error
        except PermissionError as error:
            raise RemoteError(f"{url}: access is refused: {error}") from error
        except urllib.error.HTTPError as error:
            if error.code in {404, 410}:
                raise RemoteAbsentError(f"{url}: there is no such file ({error.code})") from error
            if error.code < 500 and error.code not in _TRANSIENT_STATUS:
                raise RemoteError(f"{url}: the server refuses it: {error}") from error
            cause: Exception = error
        except OSError as error:
            if error.errno in _OWN_DISK:
                raise
            cause = error
        except Exception as error:  # of a library behind fsspec; the last one is raised
            cause = error
        if attempt == attempts:
            shown = str(cause) or type(cause).__name__
            raise RemoteError(
                f"{url} could not be fetched in {attempts} attempts; the last failed with: {shown}"
            ) from cause
        _log.warning("%s: %s; trying again in %.1f s", url, cause, delay_s)
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, MAX_DELAY_S)
    raise AssertionError


@dataclass
class _Http:
    """A transfer that goes on behind what has come, if the file is still the same.

    validator  names the version of which the first part came; without one it starts anew
    """

    url: str
    validator: str = ""

    def go_on(self, file: IO[bytes], on_length: Callable[[int], None]) -> None:
        start = file.seek(0, io.SEEK_END)
        request = urllib.request.Request(self.url, headers={"User-Agent": "openblip"})
        if start and self.validator:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", self.validator)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            # Not every server heeds a range.
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                file.seek(0)
                file.truncate()
            etag = response.headers.get("ETag", "")
            # A weak tag does not promise the same bytes.
            self.validator = "" if etag.startswith("W/") else etag
            length = response.headers.get("Content-Length")
            if length is not None:
                on_length(int(length))
            num_bytes = _copy(response, file)
        if length is not None and num_bytes != int(length):
            raise _TruncatedError(f"{num_bytes} of {length} bytes came")


@dataclass
class _Filesystem:
    """A transfer through fsspec, whose libraries try again on their own; it starts anew."""

    url: str

    def go_on(self, file: IO[bytes], on_length: Callable[[int], None]) -> None:
        files, path = _filesystem(self.url)
        file.seek(0)
        file.truncate()
        with files.open(path, "rb", cache_type="readahead", block_size=8 * CHUNK_BYTES) as source:
            size = int(files.size(path))
            on_length(size)
            num_bytes = _copy(source, file)
        if num_bytes != size:
            raise _TruncatedError(f"{num_bytes} of {size} bytes came")


def _copy(source: Any, file: IO[bytes]) -> int:
    num_bytes = 0
    while chunk := source.read(CHUNK_BYTES):
        num_bytes += file.write(chunk)
    return num_bytes


def _filesystem(url: str) -> tuple[Any, str]:
    # Slow to import, and local data do not need it.
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise RemoteError(
            f"{url} needs a library that is not installed ({error}); for s3:// and gs://: "
            "pip install 'openblip[cloud]'"
        ) from error
    except ValueError as error:
        raise RemoteError(f"{url}: {error}") from error
    return files, str(path)
