"""`openblip export`: models for other programs. Parse, call, print, as in `cli`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from openblip.cli_options import AsJson, ModelArgument
from openblip.cli_output import answer, table

if TYPE_CHECKING:
    from openblip.onnx_export import OnnxReport

export_app = typer.Typer(
    help="Write a model for other programs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@export_app.callback()
def start() -> None:
    """Keep `export onnx` a command of a group, which more may join."""


@export_app.command("onnx")
def onnx(
    model: ModelArgument,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; a new one.")],
    precision: Annotated[
        Literal["float32", "int8"],
        typer.Option(help="Of the products; int8 is smaller, and less accurate."),
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Write a model that captions and matches as ONNX files.

    The folder takes the place of a checkpoint where a model is only asked, as in `openblip
    caption --model DIR`. Prints the files, and how far their results are from the model's on random
    images and texts. Needs the extra `onnx`.
    """
    from openblip.hub import load
    from openblip.onnx_export import export_onnx

    report = export_onnx(*load(model), target, precision=precision)
    answer({"folder": str(target), **report.to_json()}, _text(report, target), as_json=as_json)


def _text(report: "OnnxReport", target: Path) -> str:
    total = sum(report.files.values())
    rows = [["file", "MB"]]
    rows += [[name, f"{size / 1e6:.2f}"] for name, size in report.files.items()]
    lines = [f"{target}: {report.precision}, {total / 1e6:.1f} MB", table(rows), ""]
    differences = report.to_json()["differences"]
    rows = [["largest difference from PyTorch", ""]]
    rows += [[name, f"{value:.2g}"] for name, value in differences.items() if value is not None]
    return "\n".join([*lines, table(rows)])
