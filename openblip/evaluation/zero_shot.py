"""Zero-shot classification: the label whose sentences fit an image best, by ITC alone.

Letters: I images, C classes, S image side in pixels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from openblip.data.files import list_files, read_batches
from openblip.evaluation.metrics import recalls
from openblip.inference import Engine
from openblip.labels import DEFAULT_TEMPLATES
from openblip.training.log import ProgressLine


@dataclass(frozen=True)
class ClassificationReport:
    """Accuracies in percent, of all images and of each class.

    unusable  files that were left out, by reason
    """

    top_1: float
    top_5: float
    top_1_by_class: Mapping[str, float]
    num_images: int
    num_classes: int
    unusable: Mapping[str, int]

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
    batch_size: int = 32,
) -> ClassificationReport:
    """Classify the images of a folder that holds a folder per class.

    names       from a folder to the words for its class; by default they are the folder's name,
                its underscores taken for spaces
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
    embeddings = [torch.zeros(0, labels.embedding.shape[1])]
    truth: list[int] = []
    with ProgressLine("images", sum(len(several) for _, several in files), unit="files") as line:
        for number, several in files:
            batches = read_batches(several, engine.image_size_px, batch_size, on_bad=on_bad)
            for paths, images in batches:
                embeddings.append(engine.embed_images(images))
                truth += [number] * len(paths)
                line.advance(len(truth) + unusable.total() - line.done)
    if not truth:
        raise ValueError(f"{data} holds no usable image: {dict(unusable)}")
    similarity = torch.cat(embeddings) @ labels.embedding.T
    owners = torch.tensor(truth)
    is_match = owners[:, None] == torch.arange(len(folders))
    top_1, top_5, _ = recalls(similarity, is_match)
    by_class = {
        name: recalls(similarity[owners == number], is_match[owners == number])[0]
        for number, name in enumerate(labels.names)
        if bool((owners == number).any())
    }
    return ClassificationReport(top_1, top_5, by_class, len(truth), len(folders), dict(unusable))
