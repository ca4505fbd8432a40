import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openblip.data.tar import BrokenTarError, read_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=180).filter(
    lambda name: name.strip("/. ") == name
)


def archive(files: dict[str, bytes], kind: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
            link = tarfile.TarInfo(name[:50] + "link")
            link.type, link.linkname = tarfile.SYMTYPE, name
            if kind != "ustar" or len(name.encode()) <= 100:
                tar.addfile(link)
    return buffer.getvalue()


@given(
    st.dictionaries(NAMES, st.binary(max_size=1100), max_size=4), st.sampled_from(["gnu", "pax"])
)
def test_it_reads_what_the_standard_library_writes(files: dict[str, bytes], kind: str) -> None:
    content = archive(files, kind)
    assert list(read_tar(io.BytesIO(content))) == list(files.items())


def test_a_path_may_be_split_as_posix_does() -> None:
    name = "a" * 120 + "/" + "b" * 90 + ".jpg"
    assert list(read_tar(io.BytesIO(archive({name: b"x"}, "ustar")))) == [(name, b"x")]


def test_a_large_file_has_a_binary_size() -> None:
    header = bytearray(archive({"a": b"12345"}, "gnu")[512:1024])
    header[124:136] = b"\x80" + (5).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert list(read_tar(io.BytesIO(bytes(header) + b"12345" + bytes(507)))) == [("a", b"12345")]


@pytest.mark.parametrize(
    ("cut", "num_whole"), [(100, 0), (512, 0), (600, 0), (612, 1), (700, 1), (1030, 1), (2600, 1)]
)
def test_a_cut_is_told_behind_what_can_be_read(cut: int, num_whole: int) -> None:
    files = {"a": b"1" * 100, "b": b"2" * 600}
    content = archive(files, "gnu")[512:]  # without the folder
    read: list[tuple[str, bytes]] = []
    with pytest.raises(BrokenTarError):
        read.extend(read_tar(io.BytesIO(content[:cut])))
    assert read == list(files.items())[:num_whole]


@pytest.mark.parametrize("content", [b"no tar", b"x" * 2000, bytes(range(256)) * 4])
def test_what_is_no_tar_is_told(content: bytes) -> None:
    with pytest.raises(BrokenTarError, match="no tar header"):
        list(read_tar(io.BytesIO(content)))


def test_nothing_is_an_empty_archive(tmp_path: Path) -> None:
    assert list(read_tar(io.BytesIO(b""))) == []
    assert list(read_tar(io.BytesIO(bytes(10240)))) == []
