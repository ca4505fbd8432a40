"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see recipes/.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
NewFolder = Annotated[
    Path,
    typer.Option(
        "--out",
        help="Checkpoint folder to write; a new one. A training that was stopped on the way to it "
        "goes on.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the recipe; the value is YAML: seed=7, optimizer.lr=1e-4, "
        "data=[/a,/b]. May be given several times.",
    ),
]
HasAblation = Annotated[
    bool,
    typer.Option(
        "--ablation", help="Train two more models: captioner alone, and filter alone (table 1)."
    ),
]
IsDry = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Write nothing; take twelve steps and say what the training would cost.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
MODEL_HELP = "Checkpoint folder, transformers folder, or name on the Hugging Face Hub."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
DATA_HELP = (
    "Tar shards, parquet, CSV, TSV, JSONL or COCO's JSON (one file, or a folder of tar or parquet "
    "shards), or a folder of images with captions beside them. A path or a URL of https, s3, gs or "
    "hf; {000..099} for several."
)
Data = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8"],
    typer.Option(
        "--dtype",
        help="Precision of the model; auto is the fastest that loses nothing worth speaking of.",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", help="Start that is given to the decoder.")]
StoreKindOption = Literal["faiss-ivf", "faiss-hnsw", "lance", "qdrant"]
