"""Pairs whose truth is known, as a filter judges them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip.batching import read_image
from openblip.capfilt.filter import Filter
from openblip.captions import clean_caption
from openblip.data.samples import Caption
from openblip.data.sources import Address, list_shards, read_samples
from openblip.images import ImageDecodeError
from openblip.training.log import ProgressLine

LABEL = "label"
"""The meta field that says whether a sample's captions are true of its image."""


@dataclass(frozen=True)
class JudgedPairs:
    """What a filter says of labelled pairs.

    probabilities  of a match
    labels         whether the pair matches
    bad            what could not be used, by reason: samples, and of a sample with several captions
                   those that are empty
    """

    probabilities: tuple[float, ...]
    labels: tuple[bool, ...]
    bad: Mapping[str, int]


def judge_labelled(data: Address, judge: Filter, batch_size: int = 32) -> JudgedPairs:
    """Judge the captions of samples that tell whether they match.

    data        JSON lines or another data set; the meta field `label` is true or false, 1 or 0, and
                holds for all captions of its sample
    judge       without a temperature: one is to be fitted to what it says
    batch_size  samples that are judged together
    Raises ValueError for what is no data set; FloatingPointError as `Filter.probabilities` does.
    """
    if judge.temperature != 1:
        raise ValueError(
            f"the filter's temperature is {judge.temperature}; pairs are judged without one"
        )
    bad: Counter[str] = Counter()
    probabilities: list[float] = []
    labels: list[bool] = []
    with ProgressLine("labelled pairs", None, unit="pairs") as progress:
        for truths, captions, images in _batches(data, judge, batch_size, bad):
            texts = [[caption.text for caption in several] for several in captions]
            for truth, several in zip(truths, judge.probabilities(images, texts), strict=True):
                probabilities += several
                labels += [truth] * len(several)
            progress.advance(sum(map(len, captions)))
    return JudgedPairs(tuple(probabilities), tuple(labels), dict(sorted(bad.items())))


def read_label(value: object) -> bool | None:
    """Return what a label says; None for what is none. Tables without types hold it as text."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def _batches(
    data: Address, judge: Filter, batch_size: int, bad: Counter[str]
) -> Iterator[tuple[list[bool], list[list[Caption]], Tensor]]:
    """Yield labels, captions and prepared images (B, 3, S, S)."""
    truths: list[bool] = []
    captions: list[list[Caption]] = []
    images: list[Tensor] = []

    def on_bad(key: str, reason: str) -> None:
        bad[reason] += 1

    for shard in list_shards(data):
        for sample in read_samples(shard, on_bad=on_bad):
            truth = read_label(sample.meta.get(LABEL))
            if truth is None:
                on_bad(sample.key, "bad_label" if LABEL in sample.meta else "missing_label")
                continue
            several = [caption for caption in sample.captions if clean_caption(caption.text)]
            if len(several) < len(sample.captions):
                bad["empty_caption"] += len(sample.captions) - len(several)
            elif not several:
                on_bad(sample.key, "missing_caption")
            if not several:
                continue
            try:
                images.append(read_image(sample.image_bytes, judge.engine.image_size_px))
            except ImageDecodeError as error:
                on_bad(sample.key, error.reason)
                continue
            truths.append(truth)
            captions.append(several)
            if len(images) == batch_size:
                yield truths, captions, torch.stack(images)
                truths, captions, images = [], [], []
    if images:
        yield truths, captions, torch.stack(images)
