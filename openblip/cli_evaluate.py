"""Commands that measure models on further tasks, and `classify`; `cli` takes them up."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from openblip.cli_options import AsJson, DtypeOption, ModelArgument, ModelOption
from openblip.cli_output import answer, say, table

Templates = Annotated[
    Path | None,
    typer.Option(
        help="Text file, a sentence with {} for the label in each line; by default five like "
        "'a picture of a {}'."
    ),
]

Score = Annotated[
    Literal["itc", "itm", "both"],
    typer.Option(
        "--score",
        help="What is asked: itc compares embeddings; itm judges the image beside every sentence "
        "of every label, which takes far longer; both adds them up.",
    ),
]


def classify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATHS", help="Image files, and folders of them.")
    ],
    model: ModelOption,
    labels: Annotated[
        str | None,
        typer.Option(help="Labels with commas between them, or a text file of one a line."),
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option(help="Text file of labels, one a line, instead of --labels.")
    ] = None,
    score: Score = "itc",
    temperature: Annotated[
        float,
        typer.Option(
            help="Divides what the shares are made of: `openblip evaluate classification` says "
            "which one makes them fit your images."
        ),
    ] = 1.0,
    templates: Templates = None,
    num_shown: Annotated[int, typer.Option("--top", min=1, help="Labels that are shown.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are encoded together.")] = 16,
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which of some labels fits an image best.

    No training is needed: each label is put into sentences, which are compared with the image.
    Prints path, label and its share among the labels for each image; the best label comes first.
    Shares sum to 1 over the labels, however ill they all fit; where ITM was asked, the JSON also
    has a match_probability of each label on its own.
    A file that is no image is named on stderr with the reason.
    """
    from openblip.data.files import list_files, read_batches
    from openblip.hub import load_engine

    names = _label_names(labels, labels_file)
    images: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []

    def on_bad(path: Path, reason: str) -> None:
        failed.append({"path": str(path), "reason": reason})
        say(f"not classified: {path}: {reason}")

    files = list_files(paths, on_bad=on_bad)
    engine = load_engine(model, dtype=dtype)
    known = engine.labels(names, _templates(templates))
    for read, batch in read_batches(files, engine.image_size_px, batch_size, on_bad=on_bad):
        guessed = engine.classify(batch, known, score=score, temperature=temperature)
        for path, guesses in zip(read, guessed, strict=True):
            best = guesses[:num_shown]
            images.append({"path": str(path), "labels": [asdict(guess) for guess in best]})
            if not as_json:
                for guess in best:
                    print(f"{path}\t{guess.label}\t{guess.probability:.4f}", flush=True)
    if as_json:
        answer({"images": images, "failed": failed}, "", as_json=True)


def evaluate_classification(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Folder that holds a folder of images per class.")
    ],
    names: Annotated[
        Path | None,
        typer.Option(
            help="JSON object from a folder to the words for its class; by default the folder's "
            "name, underscores taken for spaces."
        ),
    ] = None,
    templates: Templates = None,
    score: Score = "itc",
    as_json: AsJson = False,
) -> None:
    """Measure classification without training.

    The share of images whose class is the label that fits best, and among the best five. The
    calibration error is the mean distance between the share that the best label was given and how
    often it was right; the temperature, for `openblip classify --temperature`, makes both agree.
    """
    from openblip.evaluation.zero_shot import class_folders
    from openblip.evaluation.zero_shot import evaluate_classification as evaluate
    from openblip.hub import load
    from openblip.inference import Engine

    class_folders(data)
    words = None if names is None else _names(names)
    texts = _templates(templates)
    engine = Engine(*load(model), dtype="float32")
    report = evaluate(engine, data, names=words, templates=texts, score=score)
    rows = [["top-1 in %", f"{report.top_1:.2f}"], ["top-5 in %", f"{report.top_5:.2f}"]]
    rows += [["calibration error", f"{report.ece:.4f}"]]
    rows += [[f"with temperature {report.temperature:g}", f"{report.ece_calibrated:.4f}"]]
    rows += [["images", str(report.num_images)], ["classes", str(report.num_classes)]]
    rows += [[f"not used: {reason}", str(number)] for reason, number in report.unusable.items()]
    answer(report.to_json(), table(rows), as_json=as_json)


def evaluate_video(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Folder of videos: files, or a folder of frames for each."
        ),
    ],
    texts: Annotated[
        Path,
        typer.Option(
            help="Captions: JSONL of clip_name and caption, or MSRVTT's CSV or JSON file."
        ),
    ],
    num_frames: Annotated[
        int, typer.Option("--frames", min=1, help="Frames that are looked at of each video.")
    ] = 8,
    shortlist: Annotated[int, typer.Option(min=1, help="Candidates that ITM re-ranks.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Measure recalls of texts for videos and the reverse, with a model of images.

    In percent; tr finds texts for a video, ir videos for a text.
    """
    from openblip.data.video import read_video_texts
    from openblip.evaluation.video import evaluate_videos
    from openblip.hub import load
    from openblip.inference import Engine

    captions = read_video_texts(texts)
    engine = Engine(*load(model), dtype="float32")
    report = evaluate_videos(engine, captions, data, num_frames=num_frames, shortlist=shortlist)
    itc, reranked = report.itc.to_json(), report.reranked.to_json()
    rows = [[name, f"{itc[name]:.2f}", f"{reranked[name]:.2f}"] for name in itc]
    size = (
        f"{report.num_videos} videos of {num_frames} frames, {report.num_texts} texts, shortlist "
        f"{shortlist}, median rank of a text's video {report.median_rank:g}"
    )
    text = table([["recall in %", "itc", "reranked"], *rows])
    answer(report.to_json(), f"{text}\n{size}", as_json=as_json)


def evaluate_nlvr(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="JSONL of sentences, each with two images, as NLVR2's files."
        ),
    ],
    predictions: Annotated[
        Path | None,
        typer.Option(help="Also write identifier,True or identifier,False here for each sentence."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say of sentences whether they are true of two images, and measure that.

    Consistency is the share of sentences that are judged right with all their images.
    """
    from openblip.evaluation.nlvr import evaluate_nlvr as evaluate
    from openblip.evaluation.nlvr import predictions_csv, read_all_pairs
    from openblip.hub import load_nlvr

    pairs = read_all_pairs(data)
    report = evaluate(*load_nlvr(model), pairs)
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        predictions.write_text(predictions_csv(report.predictions), encoding="utf-8")
    measured = {"accuracy in %": report.accuracy, "consistency in %": report.consistency}
    rows = [[name, f"{value:.2f}"] for name, value in measured.items() if value is not None]
    text = table([*rows, ["sentences", str(len(pairs))]])
    answer(report.to_json(), text, as_json=as_json)


def _templates(path: Path | None) -> Sequence[str]:
    from openblip.labels import DEFAULT_TEMPLATES

    return DEFAULT_TEMPLATES if path is None else [line for line in _lines(path) if line.strip()]


def _label_names(labels: str | None, file: Path | None) -> list[str]:
    """Return what `--labels` or `--labels-file` names. Raises ValueError unless one is given."""
    if (labels is None) == (file is None):
        raise ValueError("give the labels either by --labels or by --labels-file")
    if file is not None:
        names = _lines(file)
    else:
        assert labels is not None
        names = _lines(Path(labels)) if Path(labels).is_file() else labels.split(",")
    return [name.strip() for name in names if name.strip()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error


def _names(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"{path} must hold an object from a folder to the words for its class")
    return values
