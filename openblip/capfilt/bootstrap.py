"""The whole loop: pre-train, fine-tune captioner and filter, CapFilt, pre-train anew, compare.

Each stage leaves its result in a folder of its own, whole or not at all; a loop that was stopped
goes on behind the last one. The rows of the ablation are those of BLIP's table 1.

    tokenizer.json   base/   captioner/   filter/   capfilt/   bootstrapped/
    filter_only/   captioner_only/               the ablation's models
    evaluation/      one JSON file per pre-trained model, with its captions
    logs/            losses of each training, JSONL
    results.json     what came out
    report.html      the same to look at, with pictures
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from openblip.capfilt.bootstrap_report import write_bootstrap_report
from openblip.capfilt.captioner import Captioner
from openblip.capfilt.filter import Filter
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.manifest import OutputPaths, manifests, read_judged
from openblip.capfilt.models import Models
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.report import planted_truth
from openblip.capfilt.shard import process_shard, rethreshold_shard
from openblip.captions import clean_caption
from openblip.checkpoint import load_checkpoint, save_checkpoint, with_roles
from openblip.config import Recipe, dump_recipe
from openblip.data.samples import Sample
from openblip.data.sinks import write_bytes_atomically, write_json_atomically
from openblip.data.sources import Address, list_shards, read_samples
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.finetune.captioning import CaptioningRecipe, finetune_captioning
from openblip.finetune.retrieval import RetrievalRecipe, finetune_retrieval
from openblip.generation import Decoding
from openblip.inference import Engine
from openblip.models.blip import Blip
from openblip.pretrain import PretrainRecipe, pretrain
from openblip.tokenizer import Tokenizer
from openblip.training.state import TrainingFiles

MODELS = ("base", "filter_only", "captioner_only", "bootstrapped")
"""The pre-trained models, in the order of BLIP's table 1."""


class EvaluationRecipe(Recipe):
    """How pre-trained models are compared, without any fine-tuning."""

    shortlist: int = Field(128, ge=1)
    prompt: str = ""
    decoding: Decoding = Decoding(method="beam", num_beams=3)


class BootstrapRecipe(Recipe):
    """One round of the loop. Both pre-trainings take the same recipe, and the same steps.

    vocab_size         of the WordPiece vocabulary, which is learned from the captions
    has_web_negatives  the filter's ITM also takes captions of the web, whatever they say, as wrong
                       for the human images (see RetrievalRun.negatives)
    """

    vocab_size: int = Field(30_524, ge=16)
    pretrain: PretrainRecipe = PretrainRecipe()
    captioner: CaptioningRecipe = CaptioningRecipe()
    filter: RetrievalRecipe = RetrievalRecipe()
    has_web_negatives: bool = False
    capfilt: CapfiltRecipe = CapfiltRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()


@dataclass(frozen=True)
class BootstrapData:
    """Noisy web pairs, clean human pairs, and clean held-out ones to compare on."""

    web: Address
    human: Address
    test: Address


def bootstrap(
    recipe: BootstrapRecipe, data: BootstrapData, out: Path, *, has_ablation: bool = False
) -> dict[str, Any]:
    """Run the loop, or what is left of it, in `out`, and return what `results.json` holds.

    has_ablation  train two more models: on web captions that the filter kept, without synthetic
                  ones; and on all web and synthetic captions, unfiltered
    Raises ValueError if `out` holds a loop of another recipe, or of shards of other names or sizes.
    """
    return _Loop(recipe, data, out).run(has_ablation)


class _Loop:
    def __init__(self, recipe: BootstrapRecipe, data: BootstrapData, out: Path) -> None:
        self.recipe, self.data, self.out = recipe, data, out
        out.mkdir(parents=True, exist_ok=True)
        (out / "logs").mkdir(exist_ok=True)
        self._claim()
        self.seconds: dict[str, float] = {}
        if (out / "seconds.json").exists():
            self.seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
        self.tokenizer = self._tokenizer()

    def run(self, has_ablation: bool) -> dict[str, Any]:
        models = [name for name in MODELS if has_ablation or not name.endswith("_only")]
        self.stages = ["base", "captioner", "filter", "capfilt", "bootstrapped"]
        self.stages += [name for name in models if name not in self.stages]
        self.stages += [_evaluation_of(name) for name in models]
        base = self._model("base", lambda: self._pretrain("base", self.data.web))
        captioner = self._model("captioner", lambda: self._finetune_captioner(base))
        judge = self._model("filter", lambda: self._finetune_filter(base))
        self._capfilt(captioner, judge)
        self._model("bootstrapped", lambda: self._pretrain("bootstrapped", self.out / "capfilt"))
        if has_ablation:
            threshold = self.recipe.capfilt.keep.threshold
            for name, keep in (
                ("filter_only", KeepRule(threshold=threshold, sources=("web",))),
                ("captioner_only", KeepRule(threshold=0.0)),
            ):
                captions = self._select(name, keep)
                self._model(name, lambda n=name, c=captions: self._pretrain(n, c))  # type: ignore[misc]
        results = self._results({name: self._evaluate(name) for name in models})
        write_json_atomically(self.out / "results.json", results)
        write_bootstrap_report(self.out, self.data)
        return results

    def _claim(self) -> None:
        """Write recipe and data into the folder, or check that they are the earlier start's."""
        data = {
            name: [[shard.name, shard.num_bytes] for shard in list_shards(path)]
            for name, path in vars(self.data).items()
        }
        for what, name, text in (
            ("another recipe", "recipe.yaml", dump_recipe(self.recipe)),
            ("other data", "data.json", json.dumps(data, indent=2) + "\n"),
        ):
            path = self.out / name
            if not path.exists():
                write_bytes_atomically(path, text.encode())
            elif path.read_text(encoding="utf-8") != text:
                raise ValueError(
                    f"{self.out} holds a loop of {what} (see {path}): choose another folder"
                )

    def _tokenizer(self) -> Tokenizer:
        path = self.out / "tokenizer.json"
        if not path.exists():
            texts = (
                clean_caption(caption.text)
                for folder in (self.data.web, self.data.human)
                for sample in _samples(folder)
                for caption in sample.captions
            )
            Tokenizer.train(texts, vocab_size=self.recipe.vocab_size).save(path)
        return Tokenizer.load(path)

    def _model(self, name: str, train: Callable[[], Blip]) -> Blip:
        """Return the model of a stage; train and save it first unless that has been done."""
        folder = self.out / name
        if not folder.exists():
            with self._timed(name):
                save_checkpoint(folder, train(), self.tokenizer, _card(name, self.recipe))
        self._files(name).remove_state()
        return load_checkpoint(folder)[0]

    def _files(self, name: str) -> TrainingFiles:
        return TrainingFiles(
            self.out / "logs" / f"{name}.jsonl",
            self.out / f"{name}.state",
            self.out / f"{name}.best",
        )

    def _pretrain(self, name: str, web: Address) -> Blip:
        return pretrain(
            self.recipe.pretrain,
            [web, self.data.human],
            self.tokenizer,
            files=self._files(name),
            title=f"pre-training {name}",
        )

    def _finetune_captioner(self, base: Blip) -> Blip:
        return finetune_captioning(
            self.recipe.captioner,
            with_roles(base, frozenset({"decode"})),
            [self.data.human],
            self.tokenizer,
            files=self._files("captioner"),
            title="fine-tuning captioner",
        )

    def _finetune_filter(self, base: Blip) -> Blip:
        return finetune_retrieval(
            self.recipe.filter,
            with_roles(base, frozenset({"text", "pair"})),
            [self.data.human],
            self.tokenizer,
            files=self._files("filter"),
            title="fine-tuning filter",
            negatives=[self.data.web] if self.recipe.has_web_negatives else [],
        )

    def _capfilt(self, captioner: Blip, judge: Blip) -> None:
        recipe = self.recipe.capfilt
        writer = Captioner(
            captioner,
            self.tokenizer,
            recipe.decoding,
            recipe.prompts,
            recipe.captions_per_image,
            recipe.seed,
            recipe.dtype,
        )
        reader = Filter(judge, self.tokenizer, recipe.dtype)
        models = Models((writer,), (reader,))
        with self._timed("capfilt"):
            for shard in list_shards(self.data.web):
                process_shard(shard, self.out / "capfilt", models, recipe)

    def _select(self, name: str, keep: KeepRule) -> Path:
        """Select anew from what CapFilt judged; return the folder of the selection."""
        folder = self.out / "selections" / name
        for manifest in manifests(self.out / "capfilt"):
            rethreshold_shard(manifest, folder, keep)
        return folder

    def _evaluate(self, name: str) -> dict[str, float]:
        """Measure a pre-trained model on the test set; the captions go to `evaluation/`."""
        path = self.out / "evaluation" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            recipe = self.recipe.evaluation
            engine = Engine(*load_checkpoint(self.out / name), dtype="float32")
            samples = list(_samples(self.data.test))
            with self._timed(_evaluation_of(name)):
                retrieval = evaluate_retrieval(engine, samples, shortlist=recipe.shortlist)
                captioning = evaluate_captioning(
                    engine, samples, prompt=recipe.prompt, decoding=recipe.decoding
                )
            report = {"retrieval": retrieval.to_json(), "captioning": captioning.to_json()}
            write_json_atomically(path, report)
        report = json.loads(path.read_text(encoding="utf-8"))
        return {**report["retrieval"]["reranked"], **report["captioning"]["scores"]}

    def _results(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        judged = [
            image
            for path in manifests(self.out / "capfilt")
            for image in read_judged(OutputPaths.of(path.stem, path.parent).captions)
        ]
        truth = planted_truth(judged, self.recipe.capfilt.keep.threshold)
        rows = {name: dict(values) for name, values in scores.items()}
        results: dict[str, Any] = {"before": rows["base"], "after": rows["bootstrapped"]}
        if len(rows) > 2:
            results["ablation"] = {name: rows[name] for name in MODELS}
        results["filter"] = truth.to_json() if truth is not None else {}
        results["seconds"] = round(sum(self.seconds.values()), 1)
        results["seconds_by_stage"] = self.seconds
        return results

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Say which stage runs, and add its seconds to those that the folder remembers."""
        place = self.stages.index(stage) + 1
        print(f"stage {place} of {len(self.stages)}: {stage}", file=sys.stderr, flush=True)
        start = time.monotonic()
        yield
        spent = self.seconds.get(stage, 0.0) + time.monotonic() - start
        self.seconds[stage] = round(spent, 1)
        write_json_atomically(self.out / "seconds.json", self.seconds)


def _evaluation_of(model: str) -> str:
    return f"evaluation of {model}"


def _samples(path: Address) -> Iterator[Sample]:
    """Read a whole data set that must be clean. Raises ValueError for the first bad sample."""

    def refuse(key: str, reason: str) -> None:
        raise ValueError(f"{path}: sample {key} is unusable: {reason}")

    for shard in list_shards(path):
        yield from read_samples(shard, on_bad=refuse)


def _card(name: str, recipe: BootstrapRecipe) -> str:
    return (
        f"# {name}\n\nA model of openblip's bootstrap loop, trained from random weights by this "
        f"recipe:\n\n```yaml\n{dump_recipe(recipe)}```\n"
    )
