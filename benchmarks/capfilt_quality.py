"""What CapFilt's options are worth on the drawn world, by the models that their data train.

    python benchmarks/capfilt_quality.py OUT 42 1 2 3 4

For every seed the quickstart gives base, captioner, filter and the web's shard. Each variant makes
its own captions of that web, pre-trains a new model on what it keeps, with the quickstart's recipe
and steps, and measures it on the same test pictures. Then precision and recall of the filter, by
kind of planted noise. What is done in OUT is not done again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openblip.capfilt.bootstrap import BootstrapRecipe
from openblip.capfilt.captioner import Captioner
from openblip.capfilt.filter import Filter
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.manifest import manifests
from openblip.capfilt.models import Models
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.report import capfilt_report
from openblip.capfilt.shard import process_shard, rethreshold_shard
from openblip.checkpoint import load_checkpoint, save_checkpoint, with_roles
from openblip.data.sinks import write_json_atomically
from openblip.data.sources import list_shards, read_samples
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.finetune.captioning import finetune_captioning
from openblip.finetune.retrieval import finetune_retrieval
from openblip.inference import Engine
from openblip.models.blip import Blip
from openblip.pretrain import pretrain
from openblip.quickstart import quickstart, quickstart_recipe
from openblip.tokenizer import Tokenizer
from openblip.training.state import TrainingFiles

SCORES = {"tr_at_1": ("TR@1", 1.0), "ir_at_1": ("IR@1", 1.0), "cider": ("CIDEr", 100.0)}
OTHER_SEED = 1000
"""Added to the seed of a second filter."""


@dataclass
class World:
    """A quickstart of one seed, and what is made beside it."""

    folder: Path
    recipe: BootstrapRecipe

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    def trained(self, name: str, train: Callable[[], Blip]) -> Blip:
        """Return a model of this name; train and save it first unless that has been done."""
        folder = self.folder / name
        if not folder.exists():
            save_checkpoint(folder, train(), self.tokenizer, f"# {name}\n")
        return load_checkpoint(folder)[0]

    def captioner(self, name: str, init: str, *, is_frozen: bool = False) -> Blip:
        """Fine-tune a captioner from the model `init`."""
        changes = {"freeze_image_encoder": is_frozen}
        return self.trained(
            name,
            lambda: finetune_captioning(
                self.recipe.captioner.model_copy(update=changes),
                with_roles(self._load(init), frozenset({"decode"})),
                [self._data("human")], self.tokenizer, files=self._files(name), title=name,
            ),
        )  # fmt: skip

    def filter(self, name: str, init: str, *, more_seed: int = 0, is_frozen: bool = False) -> Blip:
        """Fine-tune a filter from the model `init`."""
        recipe = self.recipe.filter
        changes = {"seed": recipe.seed + more_seed, "freeze_image_encoder": is_frozen}
        recipe = recipe.model_copy(update=changes)
        return self.trained(
            name,
            lambda: finetune_retrieval(
                recipe, with_roles(self._load(init), frozenset({"text", "pair"})),
                [self._data("human")], self.tokenizer, files=self._files(name), title=name,
            ),
        )  # fmt: skip

    def capfilt(self, name: str, captioner: Blip, filters: Sequence[Blip], **changes: Any) -> Path:
        """Caption and filter the web, with changes of the quickstart's settings."""
        recipe: CapfiltRecipe = self.recipe.capfilt.model_copy(update=changes)
        writer = Captioner(
            captioner, self.tokenizer, recipe.decoding, recipe.prompts, recipe.captions_per_image,
            recipe.seed, recipe.dtype,
        )  # fmt: skip
        readers = tuple(Filter(judge, self.tokenizer, recipe.dtype) for judge in filters)
        out = self.folder / "variants" / name
        for shard in list_shards(self._data("web")):
            process_shard(shard, out, Models((writer,), readers), recipe)
        return out

    def scores(self, name: str, captions: Path) -> dict[str, float]:
        """Pre-train on kept captions and human ones, and measure."""
        path = self.folder / "variants" / f"{name}.json"
        if not path.exists():
            model = self.trained(
                f"model_{name}",
                lambda: pretrain(
                    self.recipe.pretrain, [captions, self._data("human")], self.tokenizer,
                    files=self._files(name), title=name,
                ),
            )  # fmt: skip
            engine = Engine(model, self.tokenizer, dtype="float32")
            recipe = self.recipe.evaluation
            [shard] = list_shards(self._data("test"))
            samples = list(read_samples(shard, on_bad=lambda key, reason: None))
            retrieval = evaluate_retrieval(engine, samples, shortlist=recipe.shortlist)
            captioning = evaluate_captioning(
                engine, samples, prompt=recipe.prompt, decoding=recipe.decoding
            )
            found = {**retrieval.reranked.to_json(), **captioning.to_json()["scores"]}
            write_json_atomically(path, found)
        scores: dict[str, float] = json.loads(path.read_text("utf-8"))
        return scores

    def _files(self, name: str) -> TrainingFiles:
        return TrainingFiles(
            self.folder / "logs" / f"{name}.jsonl",
            self.folder / f"{name}.state",
            self.folder / f"{name}.best",
        )

    def _load(self, name: str) -> Blip:
        return load_checkpoint(self.folder / name)[0]

    def _data(self, name: str) -> Path:
        return self.folder / "world" / name


def run(folder: Path, seed: int) -> dict[str, Any]:
    """Return the scores of all variants of one seed, and what the filter did."""
    results = quickstart(folder, seed=seed)
    world = World(folder, quickstart_recipe(seed))
    captioner, judge = world.captioner("captioner", "base"), world.filter("filter", "base")
    second = world.filter("filter_second", "base", more_seed=OTHER_SEED)
    scores = {"web as it is": results["before"], "two captions": results["after"]}
    one = world.capfilt("one", captioner, [judge], captions_per_image=1)
    scores["one caption"] = world.scores("one", one)
    four = world.capfilt("four", captioner, [judge], captions_per_image=4)
    best = folder / "variants" / "best"
    for manifest in manifests(four):
        rethreshold_shard(manifest, best, KeepRule(best=1))
    scores["four captions"] = world.scores("four", four)
    scores["best one of four and the web's"] = world.scores("best", best)
    both = world.capfilt("ensemble", captioner, [judge, second])
    scores["two captions, two filters"] = world.scores("ensemble", both)
    again = world.capfilt(
        "round_2",
        world.captioner("captioner_2", "bootstrapped"),
        [world.filter("filter_2", "bootstrapped")],
    )
    scores["two captions, second round"] = world.scores("round_2", again)
    frozen = world.capfilt(
        "frozen",
        world.captioner("captioner_frozen", "base", is_frozen=True),
        [world.filter("filter_frozen", "base", is_frozen=True)],
    )
    scores["two captions, one image encoder for all"] = world.scores("frozen", frozen)
    truths = {
        "first round": capfilt_report(folder / "capfilt")["planted_truth"],
        "two filters": capfilt_report(both)["planted_truth"],
        "second round": capfilt_report(again)["planted_truth"],
        "image encoder of the base": capfilt_report(frozen)["planted_truth"],
    }
    return {"seed": seed, "scores": scores, "truth": truths}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ({deviation:.{digits}f})"


def print_tables(results: Sequence[dict[str, Any]]) -> None:
    """Print means over seeds, and how often a variant is better than its counterpart."""
    print(f"seeds {', '.join(str(r['seed']) for r in results)}; mean (standard deviation)\n")
    print(f"| pre-trained on human captions and | {' | '.join(n for n, _ in SCORES.values())} |")
    print("|---|" + "---|" * len(SCORES))
    for name in results[0]["scores"]:
        cells = [
            spread([scale * r["scores"][name][score] for r in results])
            for score, (_, scale) in SCORES.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| filter | ROC-AUC | precision | kept by kind of noise |\n|---|---|---|---|")
    for name in results[0]["truth"]:
        truths = [r["truth"][name] for r in results]
        kept = ", ".join(
            f"{kind} {spread([100 * t['keep_rate'][kind] for t in truths])} %"
            for kind in truths[0]["keep_rate"]
        )
        auc = spread([t["roc_auc"] for t in truths], 3)
        precision = spread([100 * t["precision"] for t in truths])
        print(f"| {name} | {auc} | {precision} % | {kept} |")


def main() -> None:
    """Run what is left, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    arguments = parser.parse_args()
    print_tables([run(arguments.out / f"seed_{seed}", seed) for seed in arguments.seeds])


if __name__ == "__main__":
    main()
