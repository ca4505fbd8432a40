"""Zero-shot classification: the label whose sentences fit an image best, by ITC, ITM or both.

Letters: I images, C classes, S image side in pixels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from openblip.data.files import list_files, read_batches
from openblip.evaluation.metrics import recalls
from openblip.evaluation.reliability import fit_softmax_temperature, top_label_error
from openblip.inference import Engine
from openblip.labels import DEFAULT_TEMPLATES, LabelScore
from openblip.training.log import ProgressLine


@dataclass(frozen=True)
class ClassificationReport:
    """Accuracies in percent, of all images and of each class.

    unusable        files that were left out, by reason
    ece             expected calibration error of the best label's share
    temperature     for `Engine.classify` with the same labels and score, that makes the shares fit
                    these images best
    ece_calibrated  with it, on the same images
    """

    top_1: float
    top_5: float
    top_1_by_class: Mapping[str, float]
    num_images: int
    num_classes: int
    unusable: Mapping[str, int]
    score: LabelScore
    ece: float
    temperature: float
    ece_calibrated: float

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self)


def class_folders(data: Path) -> list[Path]:
    """Return the folders that hold one class each, by name.

    Raises ValueError if there are none.
    """
    if not data.is_dir():
        raise ValueError(f"{data} is no folder, expected one with a folder of images per class")
    folders = sorted(path for path in data.iterdir() if path.is_dir())
    if not folders:
        raise ValueError(f"{data} holds no folder, expected one of images per class")
    return folders


def evaluate_classification(
    engine: Engine,
    data: Path,
    *,
    names: Mapping[str, str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    score: LabelScore = "itc",
    batch_size: int = 32,
) -> ClassificationReport:
    """Classify the images of a folder that holds a folder per class.

    names       from a folder to the words for its class; by default they are the folder's name,
                its underscores taken for spaces
    score       as of `Engine.classify`
    Raises ValueError for folders that are absent, empty or have no name, and if no image is usable.
    """
    folders = class_folders(data)
    if names is None:
        names = {folder.name: folder.name.replace("_", " ") for folder in folders}
    if unnamed := [folder.name for folder in folders if folder.name not in names]:
        raise ValueError(f"folders of {data} without a name of their class: {unnamed[:8]}")
    labels = engine.labels([names[folder.name] for folder in folders], templates)
    unusable = Counter[str]()

    def on_bad(path: Path, reason: str) -> None:
        unusable[reason.partition(":")[0]] += 1

    files = [(number, list_files([folder], on_bad=on_bad)) for number, folder in enumerate(folders)]
    scores: list[Tensor] = []
    logits: list[Tensor] = []
    truth: list[int] = []
    with ProgressLine("images", sum(len(several) for _, several in files), unit="files") as line:
        for number, several in files:
            batches = read_batches(several, engine.image_size_px, batch_size, on_bad=on_bad)
            for paths, images in batches:
                found = engine.label_scores(images, labels, score)
                scores.append(found.similarity if score == "itc" else found.logits)
                logits.append(found.logits)
                truth += [number] * len(paths)
                line.advance(len(truth) + unusable.total() - line.done)
    if not truth:
        raise ValueError(f"{data} holds no usable image: {dict(unusable)}")
    ordered, shared = torch.cat(scores), torch.cat(logits)
    owners = torch.tensor(truth)
    is_match = owners[:, None] == torch.arange(len(folders))
    top_1, top_5, _ = recalls(ordered, is_match)
    by_class = {
        name: recalls(ordered[owners == number], is_match[owners == number])[0]
        for number, name in enumerate(labels.names)
        if bool((owners == number).any())
    }
    temperature = fit_softmax_temperature(shared, owners)
    return ClassificationReport(
        top_1=top_1,
        top_5=top_5,
        top_1_by_class=by_class,
        num_images=len(truth),
        num_classes=len(folders),
        unusable=dict(unusable),
        score=score,
        ece=top_label_error(shared, owners),
        temperature=temperature,
        ece_calibrated=top_label_error(shared, owners, temperature),
    )
