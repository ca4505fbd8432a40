"""Public question files: VQA v2, Visual Genome and the lists of the released BLIP code.

They become JSONL of one line an image, which `data.sources` reads, with its questions under `qa`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openblip.data.sinks import write_bytes_atomically

VISUAL_GENOME_WEIGHT = 0.2
"""Of its answers, each of one person, in the released code."""
VISUAL_GENOME_FOLDERS = ("VG_100K", "VG_100K_2")


@dataclass(frozen=True)
class ImageQuestions:
    """An image and all that is asked about it.

    paths  of the image below the folder of images; the first that exists is taken
    qa     as `data.questions` reads it
    """

    key: str
    paths: tuple[str, ...]
    qa: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class WrittenQuestions:
    """What was written; images that are not there are written, too, and are bad samples later."""

    num_images: int
    num_questions: int
    num_missing: int


def read_vqa2(questions: Path, annotations: Path | None) -> list[ImageQuestions]:
    """Read VQA v2's questions and, but for the test questions, their answers by ten people.

    Raises ValueError for files of another form, and for questions that the annotations lack.
    """
    try:
        content = json.loads(questions.read_text("utf-8"))
        part, asked = content["data_subtype"], content["questions"]
        answers = None
        if annotations is not None:
            rows = json.loads(annotations.read_text("utf-8"))["annotations"]
            answers = {row["question_id"]: [a["answer"] for a in row["answers"]] for row in rows}
        by_image: dict[int, list[Mapping[str, Any]]] = {}
        for row in asked:
            qa = {"question": row["question"], "question_id": row["question_id"]}
            if answers is not None:
                qa["answers"] = answers[row["question_id"]]
            by_image.setdefault(row["image_id"], []).append(qa)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{questions} and {annotations} are no questions and annotations of VQA v2: {error!r}"
        ) from error
    return [
        ImageQuestions(name, (f"{part}/{name}.jpg", f"{name}.jpg"), tuple(qa))
        for image, qa in by_image.items()
        for name in [f"COCO_{part}_{image:012d}"]
    ]


def read_visual_genome(questions: Path) -> list[ImageQuestions]:
    """Read Visual Genome's `question_answers.json`.

    Its answers are sentences: lower case, without the full stop, as BLIP's other answers are.
    Raises ValueError for a file of another form.
    """
    try:
        return [
            ImageQuestions(
                str(image["id"]),
                tuple(f"{folder}/{image['id']}.jpg" for folder in VISUAL_GENOME_FOLDERS),
                tuple(
                    {
                        "question": row["question"],
                        "question_id": row["qa_id"],
                        "answers": [row["answer"].strip().rstrip(".").lower()],
                        "weights": [VISUAL_GENOME_WEIGHT],
                    }
                    for row in image["qas"]
                ),
            )
            for image in json.loads(questions.read_text("utf-8"))
            if image["qas"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{questions} is no file of Visual Genome's kind: {error!r}") from error


def read_blip_questions(questions: Path) -> list[ImageQuestions]:
    """Read a list of the released BLIP code, such as vqa_train.json or vg_qa.json.

    Raises ValueError for a file of another form.
    """
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    try:
        for row in json.loads(questions.read_text("utf-8")):
            qa = {"question": row["question"], "question_id": row["question_id"]}
            if row["dataset"] == "vg":
                qa |= {"answers": [row["answer"]], "weights": [VISUAL_GENOME_WEIGHT]}
            elif "answer" in row:
                qa["answers"] = row["answer"]
            by_image.setdefault(row["image"], []).append(qa)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{questions} is no list of questions of BLIP's: {error!r}") from error
    return [ImageQuestions(Path(image).stem, (image,), tuple(qa)) for image, qa in by_image.items()]


def write_questions(rows: Iterable[ImageQuestions], images: Path, out: Path) -> WrittenQuestions:
    """Write JSONL beside which, or wherever, the images lie below `images`."""
    lines: list[str] = []
    num_questions = num_missing = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        found = [path for path in row.paths if (images / path).is_file()]
        num_missing += not found
        path = images / (found or row.paths)[0]
        image = os.path.relpath(path, out.parent)
        lines.append(json.dumps({"key": row.key, "image": image, "qa": row.qa}))
        num_questions += len(row.qa)
    write_bytes_atomically(out, "".join(f"{line}\n" for line in lines).encode())
    return WrittenQuestions(len(lines), num_questions, num_missing)
