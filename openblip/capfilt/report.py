"""What CapFilt did: counts, keep rates, and the filter's accuracy where the truth is known.

`report.json` holds the numbers of a CapFilt folder, `report.html` shows them with examples.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.manifest import Manifest, judged_by, manifests, some_manifests
from openblip.capfilt.report_agreement import Disagreements, SimilarityTally
from openblip.capfilt.report_page import write_report_page
from openblip.capfilt.report_shards import keep_rate_by_shard, throughput
from openblip.capfilt.report_words import RepeatedTexts, WordTally
from openblip.data.sinks import write_json_atomically
from openblip.evaluation.metrics import roc_auc

TRUE_CAPTION = "none"
"""Value of the meta field `noise` of an image whose web caption is true."""

NUM_BINS = 20
"""Bins of the match probability's histograms, over [0, 1]."""


@dataclass(frozen=True)
class PlantedTruth:
    """The filter against web captions of known truth, which the meta field `noise` tells.

    roc_auc           of the match probability, all kinds of noise together
    roc_auc_by_noise  true captions against the wrong ones of one kind
    keep_rate         share kept at the threshold by kind; `none` are the true ones
    num_captions      by kind
    precision         share of true captions among the kept ones
    num_not_judged    by kind, those without a match probability; they are not in the ROC-AUC, and
                      count as dropped in the keep rate
    """

    roc_auc: float
    roc_auc_by_noise: Mapping[str, float]
    keep_rate: Mapping[str, float]
    num_captions: Mapping[str, int]
    precision: float
    num_not_judged: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def planted_truth(images: Iterable[JudgedImage], threshold: float) -> PlantedTruth | None:
    """Compare the filter's judgement of web captions with the planted truth; None without one."""
    by_noise: dict[str, list[float]] = defaultdict(list)
    not_judged = Counter[str]()
    for image in images:
        if "noise" not in image.meta:
            continue
        noise = str(image.meta["noise"])
        for caption in image.captions:
            if caption.source != "web":
                continue
            if caption.match_probability is None:
                not_judged[noise] += 1
            else:
                by_noise[noise].append(caption.match_probability)
    true = by_noise.pop(TRUE_CAPTION, [])
    if not true or not by_noise:
        return None
    wrong = [probability for several in by_noise.values() for probability in several]

    def auc(negatives: list[float]) -> float:
        return roc_auc(true + negatives, [1] * len(true) + [0] * len(negatives))

    def kept(probabilities: list[float]) -> int:
        return sum(probability >= threshold for probability in probabilities)

    noises = sorted({*by_noise, *not_judged} - {TRUE_CAPTION})
    kinds = {TRUE_CAPTION: true, **{noise: by_noise.get(noise, []) for noise in noises}}
    num_captions = {kind: len(values) + not_judged[kind] for kind, values in kinds.items()}
    return PlantedTruth(
        roc_auc=auc(wrong),
        roc_auc_by_noise={kind: auc(values) for kind, values in sorted(by_noise.items())},
        keep_rate={kind: kept(values) / num_captions[kind] for kind, values in kinds.items()},
        num_captions=num_captions,
        precision=kept(true) / max(1, kept(true) + kept(wrong)),
        num_not_judged={kind: not_judged[kind] for kind in kinds},
    )


def write_capfilt_report(folder: Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` into a CapFilt folder; return what the first holds.

    Raises ValueError as `capfilt_report` does, and if a shard named `report` lies there.
    """
    report = capfilt_report(folder)
    if folder / "report.json" in manifests(folder):
        raise ValueError(
            f"{folder}/report.json is the manifest of a shard named 'report': rename the shard"
        )
    write_json_atomically(folder / "report.json", report)
    write_report_page(report, folder)
    return report


def capfilt_report(folder: Path) -> dict[str, Any]:
    """Sum up a CapFilt folder in plain values.

    Returns  images and captions by what became of them; match probabilities in NUM_BINS bins, and
             how many captions have none; lengths, vocabulary and repetition as `WordTally` counts
             them; `disagreements` of ITC and ITM; keep rates and speeds of the shards;
             `runs`: models and settings, one entry unless shards of several runs lie together;
             `planted_truth` where the samples tell it and all shards have one threshold
    Raises ValueError for a folder without manifests, for a match probability or a similarity that
    is NaN, and where a manifest and the judged captions beside it disagree.
    """
    done = {path: Manifest.read(path) for path in some_manifests(folder)}
    total, bad, shards = _Tally(), Counter[str](), []
    words, similarities = WordTally(), SimilarityTally()
    for path, manifest in done.items():
        tally = _Tally()
        for image in judged_by([path]):
            tally.add(image)
            words.add(image)
            similarities.add(image)
        _check(path, manifest, tally)
        total.update(tally)
        bad.update(manifest.bad)
        shard_seconds = manifest.seconds["total"]
        shards.append(
            {
                "name": path.stem,
                "num_images": tally.num_images,
                "num_images_kept": tally.num_images_kept,
                "bad": dict(sorted(manifest.bad.items())),
                "captions": tally.captions(),
                "seconds": shard_seconds,
                "images_per_s": tally.num_images / shard_seconds if shard_seconds else None,
            }
        )
    seconds = sum(manifest.seconds["total"] for manifest in done.values())
    report: dict[str, Any] = {
        "num_shards": len(done),
        "num_images": total.num_images,
        "num_images_kept": total.num_images_kept,
        "bad": dict(sorted(bad.items())),
        "captions": total.captions(),
        "match_probability": {
            "by_source": _bins(total.bins_by_source),
            "by_noise": _bins(total.bins_by_noise),
            "not_judged": dict(sorted(total.not_judged.items(), reverse=True)),
        },
        "caption_lengths": words.lengths_to_json(),
        "vocabulary": words.vocabulary_to_json(),
        **_second_look(list(done), words.repeated(), similarities),
        "runs": _runs(done.values()),
        "seconds": round(seconds, 3),
        "images_per_s": round(total.num_images / seconds, 2) if seconds else None,
    }
    thresholds = {manifest.settings["keep"]["threshold"] for manifest in done.values()}
    if total.bins_by_noise and len(thresholds) == 1:
        truth = planted_truth(judged_by(done), thresholds.pop())
        if truth is not None:
            report["planted_truth"] = truth.to_json()
    report["keep_rate_by_shard"] = keep_rate_by_shard(shards)
    report["throughput"] = throughput(shards)
    report["shards"] = shards
    return report


def _second_look(
    paths: Sequence[Path], repeated: Mapping[int, int], similarities: SimilarityTally
) -> dict[str, Any]:
    """Return what can be told only once all captions were counted."""
    texts, disagreements = RepeatedTexts(repeated), Disagreements(similarities)
    for path in paths:
        for image in judged_by([path]):
            texts.add(image)
            disagreements.add(path.stem, image)
    return {
        "repeated_captions": texts.to_json(),
        "disagreements": disagreements.to_json(),
    }


@dataclass
class _Tally:
    """Counts of judged images and captions."""

    num_images: int = 0
    num_images_kept: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    bins_by_source: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    bins_by_noise: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    not_judged: Counter[str] = field(default_factory=Counter)

    def add(self, image: JudgedImage) -> None:
        self.num_images += 1
        self.num_images_kept += any(caption.drop_reason is None for caption in image.captions)
        for caption in image.captions:
            if caption.drop_reason is None:
                self.kept[caption.source] += 1
            else:
                self.dropped[caption.source][caption.drop_reason] += 1
            by_source = self.bins_by_source[caption.source]
            if caption.match_probability is None:  # dropped before ITM saw it
                self.not_judged[caption.source] += 1
                continue
            if math.isnan(caption.match_probability):
                raise ValueError(
                    f"image {image.key}: its match probability is NaN; train the filter anew"
                )
            place = min(NUM_BINS - 1, int(caption.match_probability * NUM_BINS))
            by_source[place] += 1
            if caption.source == "web" and "noise" in image.meta:
                self.bins_by_noise[str(image.meta["noise"])][place] += 1

    def update(self, other: "_Tally") -> None:
        self.num_images += other.num_images
        self.num_images_kept += other.num_images_kept
        self.kept.update(other.kept)
        for source, reasons in other.dropped.items():
            self.dropped[source].update(reasons)
        for source, bins in other.bins_by_source.items():
            self.bins_by_source[source].update(bins)
        for noise, bins in other.bins_by_noise.items():
            self.bins_by_noise[noise].update(bins)
        self.not_judged.update(other.not_judged)

    def captions(self) -> dict[str, dict[str, Any]]:
        """Return what became of the captions, by source: web, synthetic, human."""
        sources = sorted({*self.kept, *self.dropped}, reverse=True)
        result = {}
        for source in sources:
            dropped = dict(sorted(self.dropped.get(source, {}).items()))
            judged = self.kept[source] + sum(dropped.values())
            result[source] = {
                "judged": judged,
                "kept": self.kept[source],
                "dropped": dropped,
                "keep_rate": self.kept[source] / judged,
            }
        return result


def _check(path: Path, manifest: Manifest, tally: _Tally) -> None:
    told = (manifest.num_images, manifest.kept, manifest.dropped)
    counted = (tally.num_images, tally.kept, tally.dropped)
    if told != counted:
        raise ValueError(
            f"{path} tells {told[0]} images, kept {dict(told[1])}, dropped {dict(told[2])}, but "
            f"the captions beside it are of {counted[0]} images, kept {dict(counted[1])}, dropped "
            f"{ {source: dict(reasons) for source, reasons in counted[2].items()} }: "
            "one of the two has changed; run CapFilt on this shard again"
        )


def _bins(groups: Mapping[str, Counter[int]]) -> dict[str, list[int]]:
    """Return counts per bin; the true captions stand before the kinds of noise."""
    names = sorted(groups, key=lambda name: (name != TRUE_CAPTION, name != "web", name))
    return {name: [groups[name][place] for place in range(NUM_BINS)] for name in names}


def _runs(done: Iterable[Manifest]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    num_shards: list[int] = []
    for manifest in done:
        run = {
            "captioner": manifest.captioner,
            "filter": manifest.filter,
            "version": manifest.version,
            "settings": dict(manifest.settings),
        }
        if run not in runs:
            runs.append(run)
            num_shards.append(0)
        num_shards[runs.index(run)] += 1
    return [{"num_shards": num, **run} for num, run in zip(num_shards, runs, strict=True)]
