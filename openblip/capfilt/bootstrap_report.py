"""The page of a whole loop: before and after, the ablation beside the paper's, losses, pictures."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openblip.capfilt.bootstrap_results import WEB, data_of, in_round
from openblip.capfilt.report import write_capfilt_report
from openblip.capfilt.report_cards import example_cards, read_pictures
from openblip.capfilt.report_page import (
    capfilt_figures,
    captions_table,
    probabilities,
    truth_table,
)
from openblip.capfilt.report_text import percent, seconds, spoken
from openblip.data.batches import stable_id
from openblip.data.sources import Address, list_shards, read_samples
from openblip.page import (
    CardLine,
    Html,
    KeyFigure,
    Section,
    bars,
    card,
    cards,
    details,
    grid,
    key_figures,
    link,
    note,
    paragraph,
    table,
    tag,
    write_page,
)
from openblip.page_charts import MOST_POINTS, Series, line_chart, thinned

if TYPE_CHECKING:
    from openblip.capfilt.bootstrap import BootstrapData

NUM_TEST_EXAMPLES = 9
_HUMAN_CAPTIONS_SHOWN = 3
_TRAININGS = {
    "base": "pre-training on the web's captions as they are",
    "captioner": "fine-tuning on human captions",
    "filter": "fine-tuning on human captions",
    "bootstrapped": "pre-training on kept web and synthetic captions",
    "filter_only": "pre-training on kept web captions",
    "captioner_only": "pre-training on all web and synthetic captions",
}
_DATA = {
    WEB: "web as it is",
    data_of("filter_only"): "web, kept by the filter",
    data_of("captioner_only"): "web and synthetic, unfiltered",
    "capfilt": "web and synthetic, kept by the filter",
}
_LOSSES = ("loss", "itc", "itm", "lm")
_ARXIV = "https://arxiv.org/abs/2201.12086"

# name in the results, name to read, scale to what papers print
_MEASURES = (
    ("tr_at_1", "TR@1", 1.0),
    ("tr_at_5", "TR@5", 1.0),
    ("ir_at_1", "IR@1", 1.0),
    ("ir_at_5", "IR@5", 1.0),
    ("bleu_4", "BLEU-4", 100.0),
    ("cider", "CIDEr", 100.0),
)
_PAPER_MEASURES = tuple(m for m in _MEASURES if m[1] in {"TR@1", "IR@1", "CIDEr"})
# Table 1 of the paper, 14M images, ViT-B: who took part, then TR@1 and IR@1 after fine-tuning on
# COCO, and CIDEr on COCO.
_PAPER = {
    "base": ("–", "–", (78.4, 60.7, 127.8)),
    "filter_only": ("–", "✓", (79.1, 61.5, 128.2)),
    "captioner_only": ("✓", "–", (79.7, 62.0, 128.9)),
    "bootstrapped": ("✓", "✓", (80.6, 63.1, 129.7)),
}


def write_bootstrap_report(out: Path, data: "BootstrapData") -> Path:
    """Write the report of a finished loop, and those of its CapFilt folders; return its path.

    Raises ValueError if `out` holds no finished loop.
    """
    try:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        num_rounds = len(results.get("rounds", [results["after"]]))
        evaluations = [
            json.loads((out / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("base", in_round("bootstrapped", num_rounds))
        ]
    except OSError as error:
        raise ValueError(f"{out} holds no finished loop: {error}") from error
    folders = [in_round("capfilt", number + 1) for number in range(num_rounds)]
    reports = {folder: write_capfilt_report(out / folder) for folder in folders}
    last = folders[-1]
    utility = results.get("data_utility")
    sections = [
        Section("Before and after", _before_after(results, evaluations[0]["retrieval"])),
        *([Section("Ablation", _ablation(results))] if "ablation" in results else []),
        *([Section("Worth of the data", _utility(utility))] if utility else []),
        Section("What CapFilt did", _capfilt(reports)),
        Section("Web pictures", example_cards(out / last)),
        Section("Test pictures", _captions(evaluations, data.test)),
        Section("Losses", _losses(out / "logs", num_rounds)),
        Section("Time and settings", _time(results, out)),
    ]
    path = out / "report.html"
    title = "One round of CapFilt" if num_rounds == 1 else f"{num_rounds} rounds of CapFilt"
    write_page(path, title, _lead(results, reports[last]), sections)
    return path


def _lead(results: Mapping[str, Any], report: Mapping[str, Any]) -> list[Html]:
    before, after = results["before"], results["after"]
    figures = [
        KeyFigure(
            f"{name} after",
            f"{scale * after[key]:.1f}",
            f"{scale * before[key]:.1f} before",
        )
        for key, name, scale in _PAPER_MEASURES
    ]
    figures += [
        KeyFigure(
            f"{source.capitalize()} kept",
            percent(counts["keep_rate"]),
            f"of {counts['judged']:,} captions",
        )
        for source, counts in report["captions"].items()
    ]
    if "planted_truth" in report:
        auc = report["planted_truth"]["roc_auc"]
        figures.append(KeyFigure("Filter's ROC-AUC", f"{auc:.3f}", "0.5 is chance"))
    figures.append(KeyFigure("Time", seconds(results["seconds"]), "all stages"))
    return [
        paragraph(
            "A model was pre-trained on captions from the web as they are (",
            tag("em", "base"),
            "). Fine-tuned on clean human captions, it became a captioner, which wrote a caption "
            "for every web picture, and a filter, which judged the web's captions and the "
            "written ones. On what the filter kept, a new model was pre-trained from the start (",
            tag("em", "bootstrapped"),
            "). ",
            *(
                ["Every further round began again with the new model, and with the web as it is. "]
                if "rounds" in results
                else []
            ),
            "The method is CapFilt, of ",
            link("BLIP (Li et al. 2022)", _ARXIV),
            ".",
        ),
        key_figures(figures),
    ]


def _before_after(results: Mapping[str, Any], test: Mapping[str, Any]) -> list[Html]:
    before, after = results["before"], results["after"]
    rounds = results.get("rounds", [])
    rows = [
        ["base (before)", *_scores(before)],
        *([f"bootstrapped, round {n}", *_scores(one)] for n, one in enumerate(rounds[:-1], 1)),
        [
            f"bootstrapped, round {len(rounds)} (after)" if rounds else "bootstrapped (after)",
            *_scores(after),
        ],
        ["difference", *(_gain(scale * (after[k] - before[k])) for k, _, scale in _MEASURES)],
    ]
    num_images, num_texts = test["num_images"], test["num_texts"]
    return [
        table("On the test pictures", ["model", *(name for _, name, _ in _MEASURES)], rows),
        note(
            f"{num_images:,} held-out pictures with {num_texts:,} human captions; no fine-tuning. "
            "TR@1: share of pictures for which the best-ranked text is theirs; IR@1: of texts for "
            "which the best-ranked picture is theirs. All values are as papers print them, times "
            f"100. One picture more or less is {100 / num_images:.2g} of TR@1, and this is one "
            "seed: small differences mean nothing."
        ),
    ]


def _ablation(results: Mapping[str, Any]) -> list[Html]:
    """Return the loop's own table 1, each row's gain over the base beside the paper's."""
    rows_of, first = results["ablation"], results["ablation"]["base"]
    rows = []
    for name, (captioner, judge, paper) in _PAPER.items():
        own = [scale * rows_of[name][key] for key, _, scale in _PAPER_MEASURES]
        base = [scale * first[key] for key, _, scale in _PAPER_MEASURES]
        pairs = zip((*own, *paper), (*base, *_PAPER["base"][2]), strict=True)
        cells = [f"{x:.1f}" + (f" ({_gain(x - y)})" if name != "base" else "") for x, y in pairs]
        rows.append([spoken(name), captioner, judge, *cells])
    names = [name for _, name, _ in _PAPER_MEASURES]
    header = ["model", "captioner", "filter", *names, *(f"BLIP {name}" for name in names)]
    rises = {
        name: all(rows_of[one][key] < rows_of[two][key] for one, two in pairwise(_PAPER))
        for key, name, _ in _PAPER_MEASURES
    }
    verdict = ", ".join(f"{name} {'yes' if rising else 'no'}" for name, rising in rises.items())
    return [
        table("Captioner and filter, alone and together", header, rows, num_text_columns=3),
        paragraph(
            f"In the paper every row is better than the one above it. Is it so here? {verdict}."
        ),
        note(
            "In brackets the gain over the base. BLIP's columns are from table 1 of ",
            link("arXiv 2201.12086", _ARXIV),
            ": 14M images, ViT-B, fine-tuned on COCO. Ours are not fine-tuned, on other data and "
            "of another size: compare the order of the rows, not the values.",
        ),
    ]


def _scores(of: Mapping[str, float]) -> list[str]:
    return [f"{scale * of[key]:.1f}" for key, _, scale in _MEASURES]


def _utility(rows_of: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Return the versions of the data, each with the scores of the model trained on it."""
    rows = [
        [
            _spoken_data(row["data"]),
            spoken(row["model"]),
            f"{row['num_captions']:,}",
            *_scores(row["scores"]),
        ]
        for row in rows_of
    ]
    header = ["data", "model", "captions", *(name for _, name, _ in _MEASURES)]
    return [
        table("What each version of the data is worth", header, rows, num_text_columns=2),
        note(
            "A caption is a pair to train on. All models took the same steps from the same random "
            "weights, beside the human captions: of many captions each was seen less often. The "
            "scores are those of the test pictures, without fine-tuning; one seed."
        ),
    ]


def _spoken_data(name: str) -> str:
    if name in _DATA:
        return _DATA[name]
    return f"{_DATA['capfilt']}, round {name.rpartition('_')[2]}"


def _gain(difference: float) -> str:
    # What rounds to nothing has no sign.
    return "0.0" if abs(difference) < 0.05 else f"{difference:+.1f}"


def _capfilt(reports: Mapping[str, Mapping[str, Any]]) -> list[Html]:
    """Return what the last round did, behind a row for each round where there are several."""
    *_, report = reports.values()
    pages = [f"{folder}/report.html" for folder in reports]
    links = [link("CapFilt report", page) for page in pages]
    if len(reports) > 1:
        links = [link(f"CapFilt report of round {n}", page) for n, page in enumerate(pages, 1)]
    return [
        *(_rounds(list(reports.values())) if len(reports) > 1 else []),
        capfilt_figures(report),
        captions_table(report),
        *truth_table(report),
        *probabilities(report),
        paragraph("More about every shard: ", Html(", ".join(links)), "."),
    ]


def _rounds(reports: Sequence[Mapping[str, Any]]) -> list[Html]:
    sources = list(reports[-1]["captions"])
    has_truth = all("planted_truth" in report for report in reports)
    rows = [
        [
            str(number),
            *(percent(report["captions"][source]["keep_rate"]) for source in sources),
            *([f"{report['planted_truth']['roc_auc']:.3f}"] if has_truth else []),
        ]
        for number, report in enumerate(reports, 1)
    ]
    header = ["round", *(f"{source} kept" for source in sources)]
    header += ["filter's ROC-AUC"] if has_truth else []
    return [table("Each round", header, rows), note("What follows is of the last round.")]


def _captions(evaluations: Sequence[Mapping[str, Any]], test: Address) -> list[Html]:
    """Return test pictures with human captions and those of the first model and the last."""
    before, after = (evaluation["captioning"]["captions"] for evaluation in evaluations)
    keys = sorted(before, key=stable_id)[:NUM_TEST_EXAMPLES]
    human: dict[str, list[str]] = {key: [] for key in keys}
    try:
        shards = list_shards(test)
    except ValueError:
        shards = []
    for shard in shards:
        for sample in read_samples(shard, on_bad=lambda key, reason: None):
            if sample.key in human:
                human[sample.key] = [c.text for c in sample.captions][:_HUMAN_CAPTIONS_SHOWN]
    pictures = read_pictures(shards, set(keys))
    items = [
        card(
            pictures[key],
            key,
            [
                CardLine("before", [before[key]]),
                CardLine("after", [after[key]]),
                *([CardLine("human", human[key])] if human[key] else []),
            ],
        )
        for key in keys
    ]
    return [
        note("Drawn by a hash of the picture's name, not picked."),
        cards("Captions of the base model (before) and of the bootstrapped one (after)", items),
    ]


def _losses(logs: Path, num_rounds: int) -> list[Html]:
    charts = []
    for name, number in product(_TRAININGS, range(1, num_rounds + 1)):
        path = logs / f"{in_round(name, number)}.jsonl"
        if not path.exists():
            continue
        title = f"{spoken(in_round(name, number))}: {_TRAININGS[name]}"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        series = [
            Series(loss, thinned([(line["step"], line[loss]) for line in lines if loss in line]))
            for loss in _LOSSES
        ]
        charts.append(line_chart(title, "step", [one for one in series if one.points]))
    return [
        grid(*charts),
        note(
            "loss is the sum that was trained on; itc, itm and lm are its parts. Pre-training sees "
            "the human captions too. Losses on different captions cannot be compared. Of more than "
            f"{MOST_POINTS} logged steps, "
            "each point is a mean of neighbours."
        ),
    ]


def _time(results: Mapping[str, Any], out: Path) -> list[Html]:
    rows = [
        (spoken(name), value, seconds(value)) for name, value in results["seconds_by_stage"].items()
    ]
    parts = [bars("Time of each stage", ("stage", "time"), rows)]
    recipe = out / "recipe.yaml"
    if recipe.exists():
        text = recipe.read_text(encoding="utf-8")
        parts.append(details("The recipe", tag("pre", text)))
    if (out / "lineage.json").exists():
        file = link("lineage.json", "lineage.json")
        parts.append(paragraph("Where every model and data folder comes from: ", file, "."))
    return parts
