"""DAQUAR's tar shards as data for VQA: python runs/daquar_data.py DATA OUT

DATA holds daquar-train-*.tar and daquar-val-*.tar, whose samples have `qa` with a list of things
as the answer; the list as a whole is the answer that counts, as DAQUAR's accuracy wants it. OUT
gets train.tar and val.tar, answers.txt (every answer of the training part) and baseline.json: the
accuracy in percent of giving each type of question the answer that its training questions have most
often. A type is the first words of a question, as many as make this most accurate.
"""

import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from openblip.data.samples import Sample
from openblip.data.sinks import ShardWriter
from openblip.data.sources import read_samples
from openblip.evaluation.vqa_accuracy import vqa_accuracy

Asked = list[tuple[str, str]]
"""Questions with their answers."""


def refuse(key: str, reason: str) -> None:
    raise ValueError(f"sample {key}: {reason}")


def joined(sample: Sample) -> Sample:
    qa = [
        {
            "question": one["question"],
            "answer": ", ".join(one["answers"]),
            "question_id": f"{sample.key}/{number}",
        }
        for number, one in enumerate(sample.meta["qa"])
    ]
    return replace(sample, meta={"qa": qa})


def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True)
    asked: dict[str, Asked] = {}
    for part in ("train", "val"):
        asked[part] = []
        with ShardWriter(out / f"{part}.tar") as writer:
            for shard in sorted(data.glob(f"daquar-{part}-*.tar")):
                for sample in map(joined, read_samples(shard, on_bad=refuse)):
                    writer.write(sample)
                    asked[part] += [(one["question"], one["answer"]) for one in sample.meta["qa"]]
    answers = Counter(answer for _, answer in asked["train"])
    (out / "answers.txt").write_text("\n".join(answers) + "\n", encoding="utf-8")
    best = max(
        (baseline(asked["train"], asked["val"], num_words) for num_words in range(1, 6)),
        key=lambda measured: measured["accuracy"],
    )
    (out / "baseline.json").write_text(json.dumps(best) + "\n", encoding="utf-8")


def baseline(train: Asked, val: Asked, num_words: int) -> dict[str, float]:
    """Return what the most frequent answers to questions of the same first words reach."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in train:
        by_type[question_type(question, num_words)][answer] += 1
    overall = Counter(answer for _, answer in train)
    correct = []
    for question, answer in val:
        counts = by_type.get(question_type(question, num_words), overall)
        correct.append(vqa_accuracy(counts.most_common(1)[0][0], [answer]))
    return {
        "accuracy": round(100 * sum(correct) / len(correct), 2),
        "num_words": num_words,
        "num_questions": len(correct),
    }


def question_type(question: str, num_words: int) -> str:
    return " ".join(question.split()[:num_words])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
