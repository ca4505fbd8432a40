"""The commands about questions: ask, evaluate, and read public question files; `cli` takes them."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from openblip.cli_options import AsJson, Data, DtypeOption, ModelArgument, ModelOption
from openblip.cli_output import answer, table
from openblip.data.samples import Sample
from openblip.data.shards import Shard
from openblip.data.sinks import write_json_atomically
from openblip.data.sources import list_shards, read_samples

Answers = Annotated[
    Path | None,
    typer.Option(
        "--answers",
        help="Choose among these answers, one a line or a JSON list, instead of writing one.",
    ),
]
Shortlist = Annotated[
    int, typer.Option(min=1, help="Answers of --answers that are judged as a whole; BLIP's 128.")
]


def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="About the image.")],
    model: ModelOption,
    answers: Answers = None,
    shortlist: Shortlist = 128,
    num_shown: Annotated[
        int | None,
        typer.Option(
            "--top",
            min=1,
            help="Show this many answers with their probabilities: shares among the answers of the "
            "shortlist, or among the beams, 3 at most, where the model writes its own.",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer questions about an image.

    Prints a line with question, tab and answer; with --top a line for each answer, the best first,
    and its probability behind another tab.
    """
    from openblip.answering import Candidates
    from openblip.data.files import prepare_image
    from openblip.hub import load_vqa
    from openblip.inference import Engine

    data = image.read_bytes()
    candidates = None if answers is None else _read_answers(answers)
    engine = Engine(*load_vqa(model), dtype=dtype)
    pixels = prepare_image(data, image, engine.image_size_px)
    chosen = None if candidates is None else Candidates.of(candidates, engine.tokenizer)
    [given] = engine.ranked_answers(
        [pixels], [questions], candidates=chosen, num_answers=num_shown or 1, shortlist=shortlist
    )
    result, lines = [], []
    for question, ranked in zip(questions, given, strict=True):
        best = ranked[0]
        row: dict[str, Any] = {
            "question": question,
            "answer": best.text,
            "log_probability": best.log_probability,
            "probability": best.probability,
        }
        if num_shown is None:
            lines.append(f"{question}\t{best.text}")
        else:
            row["ranked"] = [asdict(one) for one in ranked]
            lines += [f"{question}\t{one.text}\t{one.probability:.4f}" for one in ranked]
        result.append(row)
    answer({"image": str(image), "answers": result}, "\n".join(lines), as_json=as_json)


def evaluate_vqa(
    model: ModelArgument,
    data: Data,
    answers: Answers = None,
    shortlist: Shortlist = 128,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Also write the answers here, as VQA's evaluation server takes them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer every question and score the answers by those that people gave.

    The accuracy is that of the VQA challenge, in percent. Data without answers give predictions
    alone.
    """
    from openblip.answering import ANSWER_DECODING, Candidates, rank_answers, write_answers
    from openblip.evaluation.vqa import evaluate_vqa as evaluate
    from openblip.hub import load_vqa

    candidates = None if answers is None else _read_answers(answers)
    shards = list_shards(data)
    vqa, tokenizer = load_vqa(model)
    if candidates is None:
        give = partial(write_answers, vqa, tokenizer, decoding=ANSWER_DECODING)
    else:
        chosen = Candidates.of(candidates, tokenizer)
        give = partial(rank_answers, vqa, candidates=chosen, shortlist=shortlist)
    report = evaluate(vqa, tokenizer, _samples(shards), answer=give)
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(predictions, report.predictions())
    accuracy = "-" if report.accuracy is None else f"{report.accuracy:.2f}"
    rows = [
        ["accuracy in %", accuracy],
        ["questions", str(len(report.answers))],
        ["with answers to compare with", str(report.num_judged)],
    ]
    answer(report.to_json(), table(rows), as_json=as_json)


def questions(
    kind: Annotated[
        Literal["vqa2", "visual-genome", "blip"],
        typer.Argument(help="Whose file: VQA v2, Visual Genome, or BLIP's own lists."),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Its questions, JSON.")],
    images: Annotated[Path, typer.Option(help="Folder that the images lie in.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL file to write, one image a line.")],
    annotations: Annotated[
        Path | None, typer.Option(help="VQA v2's answers, JSON; none for its test questions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make data for VQA of public question files."""
    from openblip.data.question_files import (
        read_blip_questions,
        read_visual_genome,
        read_vqa2,
        write_questions,
    )

    if annotations is not None and kind != "vqa2":
        raise ValueError(f"--annotations are of vqa2 alone: {kind} has its answers in {file}")
    match kind:
        case "vqa2":
            rows = read_vqa2(file, annotations)
        case "visual-genome":
            rows = read_visual_genome(file)
        case "blip":
            rows = read_blip_questions(file)
    written = write_questions(rows, images, out)
    text = f"{out}: {written.num_questions} questions about {written.num_images} images"
    if written.num_missing:
        text += f"; {written.num_missing} images are not in {images}"
    answer({"file": str(out), **asdict(written)}, text, as_json=as_json)


def _read_answers(path: Path) -> list[str]:
    """Read a list of answers. Raises ValueError if it is none."""
    text = path.read_text("utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{path} is no list of answers")
    return values


def _samples(shards: list[Shard]) -> Iterator[Sample]:
    def refuse(key: str, reason: str) -> None:
        raise ValueError(f"sample {key} is unusable: {reason}")

    for shard in shards:
        yield from read_samples(shard, on_bad=refuse)
