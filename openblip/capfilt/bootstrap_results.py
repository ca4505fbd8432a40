"""What a loop found: its models' scores, round by round, and the worth of each version of the data.

A round's folders are `captioner`, `filter`, `capfilt` and `bootstrapped`; from the second on, these
names with `_2`, `_3` and so on.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openblip.capfilt.manifest import Manifest, judged_by, manifests
from openblip.capfilt.report import planted_truth
from openblip.captions import clean_caption

ABLATION = ("filter_only", "captioner_only")
MODELS = ("base", *ABLATION, "bootstrapped")
"""The pre-trained models of one round, in the order of BLIP's table 1."""

WEB = "web"
"""The name of the web as it is among the versions of the data."""


def in_round(name: str, number: int) -> str:
    """Return the name that a stage of the first round has in that of a number."""
    return name if number == 1 else f"{name}_{number}"


def data_of(model: str) -> str:
    """Return what a model was pre-trained on beside human captions: `web`, or a loop's folder."""
    if model == "base":
        return WEB
    if model in ABLATION:
        return f"selections/{model}"
    return model.replace("bootstrapped", "capfilt")


def loop_results(
    out: Path, scores: Mapping[str, Mapping[str, float]], *, num_rounds: int, threshold: float
) -> dict[str, Any]:
    """Sum up a loop in plain values.

    scores     of each pre-trained model, by its name
    threshold  of the match probability, to compare the filter with planted truth
    Returns  `before` and `after`: the base model and that of the last round; `rounds`: the model of
             each round, if there are several; `ablation`: the models of table 1, if they were
             trained; `data_utility`: as `data_utility` returns; `filter`: that of the last round
             against the planted truth, empty without one
    """
    rows = {name: dict(values) for name, values in scores.items()}
    by_round = [rows[in_round("bootstrapped", number + 1)] for number in range(num_rounds)]
    results: dict[str, Any] = {"before": rows["base"], "after": by_round[-1]}
    if num_rounds > 1:
        results["rounds"] = by_round
    if rows.keys() >= set(ABLATION):
        results["ablation"] = {name: rows[name] for name in MODELS}
    results["data_utility"] = data_utility(out, rows)
    truth = planted_truth(judged_by(manifests(out / in_round("capfilt", num_rounds))), threshold)
    results["filter"] = truth.to_json() if truth is not None else {}
    return results


def data_utility(out: Path, scores: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Judge each version of the web's data by the model that was pre-trained on it.

    All models took the same steps, and the human captions beside the version.
    Returns one row for each model: the name of the data, that of the model, the number of captions,
    each of which is a pair, in all and by source, and the model's scores. Of the web as it is,
    the captions of those images count that CapFilt could take.
    """
    rows = []
    for model, values in scores.items():
        data = data_of(model)
        captions = _num_of_web(out) if data == WEB else _num_kept(out / data)
        rows.append(
            {
                "data": data,
                "model": model,
                "num_captions": captions.total(),
                "captions_by_source": dict(sorted(captions.items())),
                "scores": dict(values),
            }
        )
    return rows


def _num_of_web(out: Path) -> Counter[str]:
    """Count what training takes of the web: all that is not empty once cleaned."""
    return Counter(
        caption.source
        for image in judged_by(manifests(out / "capfilt"))
        for caption in image.captions
        if caption.source != "synthetic" and clean_caption(caption.text)
    )


def _num_kept(folder: Path) -> Counter[str]:
    total = Counter[str]()
    for path in manifests(folder):
        total.update(Manifest.read(path).kept)
    return total
