"""`openblip explain`: parse, call, print, as in `cli`."""

import io
from pathlib import Path
from typing import Annotated

import typer

from openblip.cli_options import AsJson, DtypeOption, ModelOption
from openblip.cli_output import answer, say, table

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def explain(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is compared with it.")],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Picture to write: .png, .jpg or .webp."),
    ] = None,
    *,
    model: ModelOption,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Cross-attention that is looked into, from 0 to the last but one; by default 7 of "
            "12 layers, and of others the one at that depth.",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Show where in an image the words of a text are found.

    Grad-CAM of the ITM head: for each word, the patches of the image that it looks at and that
    raise the probability of a match. OUT gets the image and a heat map for each word beside it.
    Prints for each word the hottest patch, counted from the top left, and how hot it is; the
    hottest of all words is 1. As JSON, the whole maps, and OUT may be left out.
    """
    from openblip.data.files import prepare_image
    from openblip.data.sinks import write_bytes_atomically
    from openblip.explain import explain as explain_match
    from openblip.explain import explanation_figure
    from openblip.hub import load_engine
    from openblip.images import decode_image

    if out is not None and out.suffix.lower() not in KINDS:
        raise ValueError(f"{out}: the name must end in {', '.join(KINDS)}")
    if out is None and not as_json:
        raise ValueError("name a picture to write, as in `openblip explain IMAGE TEXT out.png`")
    data = image.read_bytes()
    engine = load_engine(model, dtype=dtype)
    pixels = prepare_image(data, image, engine.image_size_px)
    explanation = explain_match(engine, pixels, text, layer=layer)
    if (tokens := engine.tokenize([text])).num_truncated:
        say(f"the text is longer than {tokens.token_ids.shape[1]} tokens and was cut")
    if out is not None:
        figure = explanation_figure(decode_image(data), explanation)
        out.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        figure.save(buffer, KINDS[out.suffix.lower()])
        write_bytes_atomically(out, buffer.getvalue())
    rows, columns = explanation.words[0].heat.shape
    result = {
        "image": str(image),
        "text": explanation.text,
        "match_probability": explanation.match_probability,
        "rows": rows,
        "columns": columns,
        "words": [{"text": one.text, "heat": one.heat.tolist()} for one in explanation.words],
        "file": None if out is None else str(out),
    }
    lines = [["word", "row", "column", "heat"]]
    for word in explanation.words:
        row, column = divmod(int(word.heat.argmax()), columns)
        highest = float(word.heat.max())
        place = [str(row + 1), str(column + 1)] if highest > 0 else ["-", "-"]
        lines.append([word.text, *place, f"{highest:.2f}"])
    told = f"match_probability {explanation.match_probability:.4f}, {rows} x {columns} patches"
    answer(result, f"{table(lines)}\n{told}\nopen {out}", as_json=as_json)
