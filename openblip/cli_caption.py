"""`openblip caption`: parse, call, print, as in `cli`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openblip.captions import DEFAULT_PROMPT
from openblip.cli_options import AsJson, DtypeOption, ModelOption, Prompt
from openblip.cli_output import answer, say
from openblip.data.caption_rows import (
    CaptionRows,
    check_sidecars_differ,
    sidecar_of,
    without_leftovers,
    write_sidecar,
)
from openblip.data.shards import checksum

if TYPE_CHECKING:
    from openblip.results import WrittenCaption

EXIT_FAILED_IMAGES = 1


def caption(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATHS", help="Image files, and folders of them.")
    ],
    model: ModelOption,
    prompt: Prompt = DEFAULT_PROMPT,
    method: Annotated[
        Literal["greedy", "beam", "nucleus"], typer.Option(help="How captions are decoded.")
    ] = "beam",
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of the method beam.")] = 3,
    top_p: Annotated[float, typer.Option(help="Mass that the method nucleus draws from.")] = 0.9,
    num_captions: Annotated[int, typer.Option("--captions", min=1, help="Per image.")] = 1,
    min_tokens: Annotated[int, typer.Option(help="Of a caption, without the prompt.")] = 5,
    max_tokens: Annotated[int, typer.Option(help="Of a caption, without the prompt.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are decoded together.")] = 16,
    seed: Annotated[int, typer.Option(help="Of nucleus, together with the file's name.")] = 42,
    dtype: DtypeOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write a .jsonl, .csv or .parquet file instead of lines. A run that was stopped "
            "goes on when it is called again."
        ),
    ] = None,
    has_sidecars: Annotated[
        bool, typer.Option("--sidecar", help="Write a .txt of the same name beside each image.")
    ] = False,
    skips_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out images that have such a .txt.")
    ] = False,
    is_strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a file could not be captioned.")
    ] = False,
    has_words: Annotated[
        bool,
        typer.Option(
            "--words",
            help="Also give every word's probability, and flags: repetition, low_confidence.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write captions for images.

    Prints a line with path, tab and caption for each. Folders are read with all that is in them.
    With --words a line goes on with a tab and, for each word, the word and its probability, then a
    tab and the flags. A caption is flagged low_confidence if a word is less probable than 0.05, or
    the tokens on average than 0.25, and repetition if words are said again at once.
    A file that is no image, or is damaged, is named on stderr with the reason, and the others are
    captioned all the same.
    """
    from openblip.data.batches import stable_id
    from openblip.data.files import list_files, read_batches
    from openblip.generation import Decoding
    from openblip.hub import load_engine, resolve
    from openblip.training.log import ProgressLine

    decoding = Decoding(
        method=method, num_beams=num_beams, top_p=top_p, min_tokens=min_tokens,
        max_tokens=max_tokens,
    )  # fmt: skip
    failed: list[dict[str, str]] = []
    new: list[dict[str, Any]] = []

    def on_bad(path: Path, reason: str) -> None:
        failed.append({"path": str(path), "reason": reason})
        new.append({"path": str(path), "error": reason})
        say(f"not captioned: {path}: {reason}")

    files = without_leftovers(list_files(paths, on_bad=on_bad))
    new.clear()  # a folder that cannot be opened is no row
    if has_sidecars:
        check_sidecars_differ(files)
    skipped = [path for path in files if skips_existing and sidecar_of(path).exists()]
    engine = load_engine(model, dtype=dtype)
    rows = None
    if out is not None:
        settings = {
            "paths": [str(path) for path in paths], "model": model,
            "weights": checksum(resolve(model)), "dtype": engine.precision,
            "decoding": decoding.to_json(), "prompt": prompt, "captions": num_captions,
            "seed": seed, "batch_size": batch_size, "sidecar": has_sidecars,
            "skip_existing": skips_existing,
        }  # fmt: skip
        if has_words:
            settings["words"] = True
        rows = CaptionRows(out, settings, files, set(skipped), has_words=has_words)
        files, skipped = rows.files, rows.skipped
    else:
        left_out = set(skipped)
        files = [path for path in files if path not in left_out]
    if skipped:
        say(f"{len(skipped)} files have captions beside them and are left out")
    num_done = 0 if rows is None else rows.num_done
    batches = read_batches(files[num_done:], engine.image_size_px, batch_size, on_bad=on_bad)
    images: list[dict[str, Any]] = []
    try:
        with ProgressLine("captions", len(files), unit="files", done=num_done) as progress:
            for names, batch in batches:
                written = engine.caption(
                    batch, prompt=prompt, decoding=decoding,
                    seeds=[stable_id(f"{seed}/{path.name!a}") for path in names],
                    captions_per_image=num_captions,
                )  # fmt: skip
                for path, several in zip(names, written, strict=True):
                    captions = [_row(one, has_words=has_words) for one in several]
                    new.append({"path": str(path), "captions": captions})
                    if has_sidecars:
                        write_sidecar(path, [one.text for one in several])
                    if rows is None and not as_json:
                        for one in several:
                            print(f"{path}\t{_line(one, has_words=has_words)}", flush=True)
                progress.advance(len(new))
                if rows is not None:
                    rows.append(new)
                elif as_json:
                    images += [row for row in new if "error" not in row]
                new.clear()
            progress.advance(len(new))
    except KeyboardInterrupt:
        if rows is not None:
            say("what is done is kept: the same command goes on from there")
        raise
    if rows is not None:
        if new:  # behind the last batch
            rows.append(new)
        rows.finish()
    if failed:
        say(f"{len(failed)} of {len(files)} files were not captioned")
    if as_json:
        result = {"images": images} if out is None else {"file": str(out), "files": len(files)}
        answer(
            {**result, "failed": failed, "skipped": [str(path) for path in skipped]},
            "",
            as_json=True,
        )
    if failed and is_strict:
        raise typer.Exit(EXIT_FAILED_IMAGES)


def _row(caption: "WrittenCaption", *, has_words: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": caption.text,
        "mean_log_probability": caption.mean_log_probability,
    }
    if has_words:
        row["flags"] = list(caption.flags)
        row["words"] = [asdict(word) for word in caption.words]
    return row


def _line(caption: "WrittenCaption", *, has_words: bool) -> str:
    if not has_words:
        return caption.text
    words = " ".join(f"{word.text} {word.probability:.2f}" for word in caption.words)
    return f"{caption.text}\t{words}\t{' '.join(caption.flags)}"
