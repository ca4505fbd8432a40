"""The quickstart with its ablation over several seeds: means and standard deviations.

    python benchmarks/quickstart_seeds.py OUT 42 1 2 3 4

Each seed has its folder in OUT; what is done there is not done again.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openblip.quickstart import quickstart

SCORES = {"tr_at_1": 1.0, "ir_at_1": 1.0, "bleu_4": 100.0, "cider": 100.0}
ROWS = {
    "base": "all web captions",
    "filter_only": "web captions that the filter kept",
    "captioner_only": "all web and synthetic captions",
    "bootstrapped": "kept web and kept synthetic captions",
}


def main(out: Path, seeds: Sequence[int]) -> None:
    results = [quickstart(out / f"seed_{s}", seed=s, has_ablation=True) for s in seeds]
    print(f"\nseeds {', '.join(map(str, seeds))}; mean (standard deviation)\n")
    print("| pre-trained on human captions and | TR@1 | IR@1 | BLEU-4 | CIDEr |")
    print("|---|---|---|---|---|")
    for row, meaning in ROWS.items():
        cells = [
            spread([factor * r["ablation"][row][score] for r in results])
            for score, factor in SCORES.items()
        ]
        print(f"| {meaning} | {' | '.join(cells)} |")
    print("\n| seed | filter ROC-AUC | TR@1 | IR@1 | CIDEr | bootstrapped wins all three |")
    print("|---|---|---|---|---|---|")
    for seed, result in zip(seeds, results, strict=True):
        print(f"| {seed} | {result['filter']['roc_auc']:.3f} | {' | '.join(change(result))} |")
    print(f"\nfilter ROC-AUC {spread([r['filter']['roc_auc'] for r in results], digits=3)}")


def change(result: dict[str, Any]) -> list[str]:
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
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
