"""The quickstart over several seeds: means and standard deviations.

    python benchmarks/quickstart_seeds.py OUT 42 1 2 3 4 [--ablation]

Each seed has its folder in OUT; what is done there is not done again.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openblip.quickstart import quickstart

SCORES = {"tr_at_1": 1.0, "ir_at_1": 1.0, "bleu_4": 100.0, "cider": 100.0}
MEANINGS = {
    "base": "all web captions",
    "filter_only": "web captions that the filter kept",
    "captioner_only": "all web and synthetic captions",
    "bootstrapped": "kept web and kept synthetic captions",
}


def main(out: Path, seeds: Sequence[int], *, has_ablation: bool) -> None:
    results = [quickstart(out / f"seed_{s}", seed=s, has_ablation=has_ablation) for s in seeds]
    print(f"\nseeds {', '.join(map(str, seeds))}; mean (standard deviation)\n")
    print("| pre-trained on human captions and | TR@1 | IR@1 | BLEU-4 | CIDEr |")
    print("|---|---|---|---|---|")
    for row in models(results[0]):
        cells = [
            spread([factor * models(result)[row][score] for result in results])
            for score, factor in SCORES.items()
        ]
        print(f"| {MEANINGS[row]} | {' | '.join(cells)} |")
    print("\n| seed | filter ROC-AUC | TR@1 | IR@1 | CIDEr | bootstrapped wins all three |")
    print("|---|---|---|---|---|---|")
    for seed, result in zip(seeds, results, strict=True):
        print(f"| {seed} | {result['filter']['roc_auc']:.3f} | {' | '.join(change(result))} |")
    print(f"\nfilter ROC-AUC {spread([r['filter']['roc_auc'] for r in results], digits=3)}")


def models(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """Return the scores of every pre-trained model of one loop."""
    pair = {"base": result["before"], "bootstrapped": result["after"]}
    return result.get("ablation", pair)


def change(result: Mapping[str, Any]) -> list[str]:
    """Return each score before and after, and whether all of them rose."""
    cells, has_won = [], True
    for score in ("tr_at_1", "ir_at_1", "cider"):
        before, after = (SCORES[score] * result[when][score] for when in ("before", "after"))
        cells.append(f"{before:.1f} -> {after:.1f}")
        has_won &= after > before
    return [*cells, "yes" if has_won else "no"]


def spread(values: Sequence[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ({deviation:.{digits}f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--ablation", action="store_true")
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, has_ablation=arguments.ablation)
