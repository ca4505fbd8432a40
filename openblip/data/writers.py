from pathlib import Path
from typing import Literal

from openblip.data.sinks import ShardWriter

OutputKind = Literal["tar", "parquet", "jsonl", "files"]


def open_writer(path: Path, kind: OutputKind) -> ShardWriter:
    return ShardWriter(path)


def output_suffix(kind: OutputKind) -> str:
    return {"tar": ".tar", "parquet": ".parquet", "jsonl": ".jsonl", "files": ""}[kind]
