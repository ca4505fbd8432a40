"""`openblip push`: a model to the Hugging Face Hub. Parse, call, print, as in `cli`."""

from pathlib import Path
from typing import Annotated

import typer

from openblip.cli_options import AsJson
from openblip.cli_output import answer


def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Checkpoint folder, or one of transformers."),
    ],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    is_public: Annotated[
        bool, typer.Option("--public", help="Let everybody see a new repository.")
    ] = False,
    license_name: Annotated[
        str | None,
        typer.Option(
            "--license", help="What the card says of it: a name of the Hub's, such as apache-2.0."
        ),
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Markdown to take for the model card, as it is.")
    ] = None,
    is_dry: Annotated[
        bool, typer.Option("--dry-run", help="Upload nothing; print the model card.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a model with a filled model card to the Hugging Face Hub.

    The card tells what the model is, how it was made and how it is used, as far as the folder and
    what lies beside it tell: read it with --dry-run first. Needs the login of `hf auth login`, or
    HF_TOKEN. A repository that exists stays as public as it is.
    """
    from openblip.hub import CARD, files_to_push, filled_card
    from openblip.hub import push as run

    if card is not None and license_name is not None:
        raise ValueError(f"--license {license_name}: it goes into the filled card, not into {card}")
    if card is None:
        text = filled_card(folder, name, license_name=license_name)
    else:
        text = card.read_text("utf-8")
    files = [*files_to_push(folder, has_card=True), CARD]
    url = None if is_dry else run(folder, name, private=not is_public, card=text)
    result = {"folder": str(folder), "name": name, "url": url, "files": files, "card": text}
    told = text.rstrip("\n") if is_dry else f"{url}: {', '.join(files)}"
    answer(result, told, as_json=as_json)
