"""The command line: parse, call, print.

Answers go to stdout, with --json as one JSON document; progress and messages go to stderr.
Exit codes: 0; 1 for `caption --strict` if an image failed; 2 for what the user can put right, with
a sentence on stderr; 130 for Ctrl-C. Any other error is ours and keeps its traceback.

Imports of torch, and of what imports it, stand inside the commands: --help must not wait for it.
"""

import io
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from openblip import (
    __version__,
    cli_bench,
    cli_capfilt,
    cli_caption,
    cli_evaluate,
    cli_explain,
    cli_export,
    cli_hub,
    cli_search,
    cli_serve,
    cli_stages,
    cli_vqa,
)
from openblip.captions import DEFAULT_PROMPT
from openblip.cli_options import AsJson, Data, DtypeOption, ModelArgument, ModelOption, Prompt
from openblip.cli_output import answer, conversion_text, say, table
from openblip.data.samples import Sample
from openblip.data.sinks import is_out_of_room, write_json_atomically
from openblip.data.sources import list_shards, read_samples

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


class _Commands(TyperGroup):
    """Turns what the user can put right into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("stopped by Ctrl-C")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (ValueError, FloatingPointError) as error:
            say(f"error: {error}")
        except OSError as error:
            is_full = is_out_of_room(error)
            if error.filename is None and not is_full:
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            room = "; make room, and run the same command again" if is_full else ""
            say(f"error: {where}{error.strerror}{room}")
        raise typer.Exit(EXIT_USER_ERROR)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate_app = typer.Typer(
    help="Measure a model on images with human captions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
evaluate_app.command("vqa")(cli_vqa.evaluate_vqa)
app.command()(cli_vqa.ask)
app.command()(cli_vqa.questions)
app.command()(cli_stages.quickstart)
app.command()(cli_stages.draw)
app.command()(cli_stages.bootstrap)
app.command()(cli_stages.pretrain)
app.command()(cli_evaluate.classify)
app.command()(cli_explain.explain)
app.command()(cli_bench.bench)
app.command()(cli_caption.caption)
app.command()(cli_hub.push)
app.command()(cli_serve.serve)
app.add_typer(cli_search.index_app, name="index")
app.command()(cli_search.search)
app.command()(cli_search.cluster)
app.add_typer(cli_stages.finetune_app, name="finetune")
app.add_typer(cli_capfilt.capfilt_app, name="capfilt")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(cli_export.export_app, name="export")
evaluate_app.command("classification")(cli_evaluate.evaluate_classification)
evaluate_app.command("video")(cli_evaluate.evaluate_video)
evaluate_app.command("nlvr")(cli_evaluate.evaluate_nlvr)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"openblip {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """BLIP, maintained: models that caption and match images, and improve their own data."""
    # Names of files may hold bytes that are no UTF-8: they are shown, and are no reason to stop.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("openblip").setLevel(logging.INFO)


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    model: ModelArgument,
    data: Data,
    shortlist: Annotated[
        int,
        typer.Option(min=1, help="Candidates that ITM re-ranks; BLIP takes 256, Flickr30k 128."),
    ] = 128,
    dtype: DtypeOption = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure recalls of texts for images and the reverse.

    In percent; tr finds texts for an image, ir images for a text.
    """
    from openblip.evaluation.retrieval import evaluate_retrieval as evaluate
    from openblip.hub import load_engine

    samples = _samples(data)
    engine = load_engine(model, dtype=dtype)
    report = evaluate(engine, samples, shortlist=shortlist)
    itc, reranked = report.itc.to_json(), report.reranked.to_json()
    rows = [[name, f"{itc[name]:.2f}", f"{reranked[name]:.2f}"] for name in itc]
    size = f"{report.num_images} images, {report.num_texts} texts, shortlist {shortlist}"
    text = table([["recall in %", "itc", "reranked"], *rows])
    answer(report.to_json(), f"{text}\n{size}", as_json=as_json)


@evaluate_app.command("captioning")
def evaluate_captioning(
    model: ModelArgument,
    data: Data,
    prompt: Prompt = DEFAULT_PROMPT,
    num_beams: Annotated[int, typer.Option("--beam", min=1, help="Beams of the search.")] = 3,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="Also write the captions here, as the servers of COCO and NoCaps take them."
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    as_json: AsJson = False,
) -> None:
    """Caption every image and score it by its own captions.

    A test set without captions is captioned for --predictions.
    """
    from openblip.evaluation.captioning import evaluate_captioning as evaluate
    from openblip.evaluation.captioning import predictions as predictions_of
    from openblip.generation import Decoding
    from openblip.hub import load_engine

    samples = _samples(data, may_lack_captions=predictions is not None)
    decoding = Decoding(method="beam", num_beams=num_beams)
    engine = load_engine(model, dtype=dtype)
    report = evaluate(engine, samples, prompt=prompt, decoding=decoding)
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(predictions, predictions_of(samples, report.captions))
    scores = report.scores.to_json() if report.scores is not None else {}
    rows = [[name, f"{value:.4f}"] for name, value in scores.items()]
    text = table([*rows, ["images", str(len(samples))]])
    answer(report.to_json(), text, as_json=as_json)


@app.command()
def match(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="Texts to judge.")],
    model: ModelOption,
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Judge how well texts fit an image.

    Prints for every text the probability of the ITM head that the pair matches, and the ITC cosine.
    """
    from openblip.data.files import prepare_image
    from openblip.hub import load_engine

    data = image.read_bytes()
    engine = load_engine(model, dtype=dtype)
    pixels = prepare_image(data, image, engine.image_size_px)
    [judged] = engine.match([pixels], [texts])
    if (tokens := engine.tokenize(texts)).num_truncated:
        most = tokens.token_ids.shape[1]
        say(f"{tokens.num_truncated} texts are longer than {most} tokens and were cut")
    matches = [{"text": text, **asdict(one)} for text, one in zip(texts, judged, strict=True)]
    lines = [f"{'match_probability':>17}  {'similarity':>10}  text"]
    lines += [
        f"{one.match_probability:17.4f}  {one.similarity:10.4f}  {text}"
        for text, one in zip(texts, judged, strict=True)
    ]
    answer({"image": str(image), "texts": matches}, "\n".join(lines), as_json=as_json)


@app.command()
def refine(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the image sought shows.")],
    model: ModelOption,
    as_json: AsJson = False,
) -> None:
    """Move an image's embedding by a text.

    For a model with a reconstruction head: see `openblip finetune reconstruction`.

    Prints the ITC cosines of the embedding before and after; as JSON also the embedding itself, to
    search images with.
    """
    from openblip.data.files import prepare_image
    from openblip.hub import load
    from openblip.inference import Engine

    data = image.read_bytes()
    engine = Engine(*load(model))
    pixels = prepare_image(data, image, engine.image_size_px)
    [refined] = engine.refine([pixels], [text])
    [before] = engine.embed_images([pixels])
    [told] = engine.embed_texts([text])
    result = {
        "image": str(image),
        "text": text,
        "similarity_to_image": float(refined @ before),
        "similarity_to_text": float(refined @ told),
        "similarity_to_text_before": float(before @ told),
        "image_embedding": refined.tolist(),
    }
    rows = [[name, f"{result[name]:.4f}"] for name in result if name.startswith("similarity")]
    answer(result, table(rows), as_json=as_json)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Released BLIP checkpoint, transformers folder, or openblip folder."),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; a new one.")],
    kind: Annotated[
        Literal["openblip", "transformers"], typer.Option("--to", help="What to write.")
    ] = "openblip",
    config: Annotated[
        Path | None, typer.Option(help="Sizes of a checkpoint: a config.json of its code.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="BERT's vocab.txt or a tokenizer.json.")
    ] = None,
    architecture: Annotated[
        Literal["BlipForConditionalGeneration", "BlipForImageTextRetrieval"] | None,
        typer.Option(help="What transformers gets of a model with all roles."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert weights from and to other libraries.

    By default a released checkpoint or a transformers folder becomes an openblip folder; with
    --to transformers an openblip folder becomes a transformers folder. Says which tensors were
    left out and why.
    """
    from openblip.convert import convert_to_openblip, convert_to_transformers

    match kind:
        case "openblip":
            if architecture is not None:
                raise ValueError(f"--architecture {architecture} is for --to transformers alone")
            report = convert_to_openblip(source, target, config=config, vocabulary=vocabulary)
        case "transformers":
            if config is not None or vocabulary is not None:
                raise ValueError(f"{source} has sizes and words: leave --config, --vocabulary out")
            report = convert_to_transformers(source, target, architecture=architecture)
    answer(report.to_json(), conversion_text(report, target), as_json=as_json)


def main() -> None:
    """Run the command that the process was called with."""
    app(prog_name="openblip")


def _samples(data: str, *, may_lack_captions: bool = False) -> list[Sample]:
    """Read a data set to measure on.

    may_lack_captions  all of them, as a test set does
    Raises ValueError naming the first sample that is unusable, before a model spends its time.
    """
    from openblip.images import ImageDecodeError, decode_image

    def refuse(key: str, reason: str) -> None:
        raise ValueError(f"{data}: sample {key} is unusable: {reason}")

    samples = [s for shard in list_shards(data) for s in read_samples(shard, on_bad=refuse)]
    is_bare = not any(sample.captions for sample in samples)
    for sample in samples:
        try:
            decode_image(sample.image_bytes)
        except ImageDecodeError as error:
            refuse(sample.key, str(error))
        if not sample.captions and not (may_lack_captions and is_bare):
            refuse(sample.key, "it has no caption to compare with")
    return samples
