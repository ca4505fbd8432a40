"""The whole loop: pre-train, fine-tune captioner and filter, CapFilt, pre-train anew, compare.

Each stage leaves its result in a folder of its own, whole or not at all; a loop that was stopped
goes on behind the last one. The rows of the ablation are those of BLIP's table 1.

    tokenizer.json   base/   captioner/   filter/   capfilt/   bootstrapped/
    captioner_2/   filter_2/   capfilt_2/   bootstrapped_2/    and so on: further rounds
    filter_only/   captioner_only/               the ablation's models
    evaluation/      one JSON file per pre-trained model, with its captions
    logs/            losses of each training, JSONL
    results.json     what came out
    lineage.json     where every model and data folder comes from
    report.html      the results to look at, with pictures
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from openblip.capfilt.bootstrap_report import write_bootstrap_report
from openblip.capfilt.bootstrap_results import (
    ABLATION,
    WEB,
    data_of,
    in_round,
    loop_results,
)
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.lineage import Made, lineage
from openblip.capfilt.manifest import manifests
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.run import EngineChoice, run_capfilt, with_threads
from openblip.capfilt.shard import rethreshold_shard
from openblip.capfilt.work import Job
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
from openblip.models.text import Role
from openblip.pretrain import PretrainRecipe, pretrain
from openblip.tokenizer import Tokenizer
from openblip.training.state import TrainingFiles

ROUND = ("captioner", "filter", "capfilt", "bootstrapped")
"""The stages of a round."""

HERE = EngineChoice()


class EvaluationRecipe(Recipe):
    """How pre-trained models are compared, without any fine-tuning."""

    shortlist: int = Field(128, ge=1)
    prompt: str = ""
    decoding: Decoding = Decoding(method="beam", num_beams=3)


class BootstrapRecipe(Recipe):
    """The loop. All pre-trainings take the same recipe, and the same steps, from random weights.

    vocab_size         of the WordPiece vocabulary, which is learned from the captions
    rounds             of captioner, filter, CapFilt on the web as it is, and pre-training anew. In
                       the second, captioner and filter start from the first one's new model
    has_web_negatives  the filter's ITM also takes captions of the web, whatever they say, as wrong
                       for the human images (see RetrievalRun.negatives)
    """

    vocab_size: int = Field(30_524, ge=16)
    rounds: int = Field(1, ge=1)
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
    recipe: BootstrapRecipe,
    data: BootstrapData,
    out: Path,
    *,
    has_ablation: bool = False,
    engine: EngineChoice = HERE,
) -> dict[str, Any]:
    """Run the loop, or what is left of it, in `out`, and return what `results.json` holds.

    has_ablation  train two more models: on web captions that the filter kept, without synthetic
                  ones; and on all web and synthetic captions, unfiltered
    engine        where CapFilt's units are worked on; what comes out does not depend on it
    Raises ValueError if `out` holds a loop of another recipe, or of shards of other names or sizes;
    if CapFilt could not do some unit; and for the engine `slurm`, of which a task does a part.
    """
    if engine.name == "slurm":
        raise ValueError("engine slurm does a part of CapFilt alone; the loop takes local or pool")
    return _Loop(recipe, data, out, engine).run(has_ablation)


class _Loop:
    def __init__(
        self, recipe: BootstrapRecipe, data: BootstrapData, out: Path, engine: EngineChoice
    ) -> None:
        self.recipe, self.data, self.out, self.engine = recipe, data, out, engine
        out.mkdir(parents=True, exist_ok=True)
        (out / "logs").mkdir(exist_ok=True)
        self._claim()
        self.seconds: dict[str, float] = {}
        if (out / "seconds.json").exists():
            self.seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
        self.tokenizer = self._tokenizer()
        self.made = [Made("tokenizer.json", "tokenizer", (WEB, "human"), ("vocab_size",))]

    def run(self, has_ablation: bool) -> dict[str, Any]:
        rounds = range(1, self.recipe.rounds + 1)
        ablation = ABLATION if has_ablation else ()
        models = ["base", *ablation, *(in_round("bootstrapped", number) for number in rounds)]
        self.stages = ["base", *(in_round(stage, number) for number in rounds for stage in ROUND)]
        self.stages += [*ablation, *(_evaluation_of(name) for name in models)]
        last = self._pretrained("base")
        for number in rounds:
            last = self._round(number, last)
        threshold = self.recipe.capfilt.keep.threshold
        rules = (KeepRule(threshold=threshold, sources=("web",)), KeepRule(threshold=0.0))
        for name, keep in zip(ablation, rules, strict=False):
            self._select(name, keep)
            self._pretrained(name)
        results = loop_results(
            self.out,
            {name: self._evaluate(name) for name in models},
            num_rounds=self.recipe.rounds,
            threshold=threshold,
        )
        results["seconds"] = round(sum(self.seconds.values()), 1)
        results["seconds_by_stage"] = self.seconds
        write_json_atomically(self.out / "results.json", results)
        came_from = lineage(self.out, self.recipe, vars(self.data), self.made)
        write_json_atomically(self.out / "lineage.json", came_from)
        write_bootstrap_report(self.out, self.data)
        return results

    def _round(self, number: int, start: str) -> str:
        """Run a round from a pre-trained model; return the name of the new one."""
        captioner, judge, folder, new = (in_round(stage, number) for stage in ROUND)
        self._model(
            Made(captioner, "model", (start, "human"), ("captioner",)),
            lambda: self._finetune_captioner(captioner, start),
        )
        negatives = (WEB,) if self.recipe.has_web_negatives else ()
        self._model(
            Made(judge, "model", (start, "human", *negatives), ("filter", "has_web_negatives")),
            lambda: self._finetune_filter(judge, start),
        )
        self._capfilt(folder, captioner, judge)
        return self._pretrained(new)

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

    def _model(self, made: Made, train: Callable[[], Blip]) -> None:
        """Train and save the model of a stage, unless that has been done."""
        name = made.name
        folder = self.out / name
        if not folder.exists():
            with self._timed(name):
                save_checkpoint(folder, train(), self.tokenizer, _card(name, self.recipe))
        self._files(name).remove_state()
        self.made.append(made)

    def _part(self, name: str, *roles: Role) -> Blip:
        """Return a model of the loop with some of its roles, to be fine-tuned."""
        return with_roles(load_checkpoint(self.out / name)[0], frozenset(roles))

    def _files(self, name: str) -> TrainingFiles:
        return TrainingFiles(
            self.out / "logs" / f"{name}.jsonl",
            self.out / f"{name}.state",
            self.out / f"{name}.best",
        )

    def _pretrained(self, name: str) -> str:
        """Pre-train a model on its version of the web's data, unless that has been done."""
        data = data_of(name)

        def train() -> Blip:
            return pretrain(
                self.recipe.pretrain,
                [self.data.web if data == WEB else self.out / data, self.data.human],
                self.tokenizer,
                files=self._files(name),
                title=f"pre-training {name}",
            )

        self._model(Made(name, "model", (data, "human", "tokenizer.json"), ("pretrain",)), train)
        return name

    def _finetune_captioner(self, name: str, start: str) -> Blip:
        return finetune_captioning(
            self.recipe.captioner,
            self._part(start, "decode"),
            [self.data.human],
            self.tokenizer,
            files=self._files(name),
            title=f"fine-tuning {name}",
        )

    def _finetune_filter(self, name: str, start: str) -> Blip:
        return finetune_retrieval(
            self.recipe.filter,
            self._part(start, "text", "pair"),
            [self.data.human],
            self.tokenizer,
            files=self._files(name),
            title=f"fine-tuning {name}",
            negatives=[self.data.web] if self.recipe.has_web_negatives else [],
        )

    def _capfilt(self, folder: str, captioner: str, judge: str) -> None:
        """Caption and filter the web as it is by two models of the loop.

        Raises ValueError if a unit could not be done; the next start tries it once more.
        """
        models = [str(self.out / name) for name in (captioner, judge)]
        job = Job((models[0],), (models[1],), self.recipe.capfilt, self.out / folder)
        with self._timed(folder):
            outcome = run_capfilt(self.data.web, with_threads(job, self.engine), self.engine)
        if outcome.failed:
            told = "; ".join(f"{unit}: {reason}" for unit, reason in outcome.failed.items())
            raise ValueError(
                f"{folder}: {len(outcome.failed)} of {outcome.num_units} units not done: {told}"
            )
        self.made.append(Made(folder, "data", (WEB, captioner, judge), ("capfilt",)))

    def _select(self, name: str, keep: KeepRule) -> None:
        """Select anew from what CapFilt judged in the first round, for a model of the ablation."""
        data = data_of(name)
        for manifest in manifests(self.out / "capfilt"):
            rethreshold_shard(manifest, self.out / data, keep)
        self.made.append(Made(data, "data", (WEB, "capfilt"), ("capfilt.keep",)))

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
        self.made.append(
            Made(f"evaluation/{name}.json", "evaluation", (name, "test"), ("evaluation",))
        )
        report = json.loads(path.read_text(encoding="utf-8"))
        return {**report["retrieval"]["reranked"], **report["captioning"]["scores"]}

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
