"""The model card of a folder that goes to the Hugging Face Hub, filled with all that is known.

It is read from the folder, from the log that lies beside it, and from the scores of a loop that it
is part of. Names of data and models stand in it, and no paths of the machine that trained it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from openblip.checkpoint import Model, model_id, pipeline_tag, roles_of
from openblip.models.blip import Blip
from openblip.models.nlvr import Nlvr
from openblip.models.vqa import Vqa
from openblip.training.log import read_log

_RECIPE = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
_ABSOLUTE_PATH = re.compile(r"(?<![\w:./~-])(?:~|[A-Za-z]:)?/(?:[^\s,'\"`\]\[{}:/]+/)*")
_DIGITS = 4


@dataclass(frozen=True)
class Made:
    """How a model was made, as far as its folder and what lies beside it tell.

    notes        sentences of its own card: where it started, what a conversion left out
    recipe       YAML; "" is not known
    inputs       names of what a loop made it from
    recipe_part  the key of a loop's recipe that it was trained by; "" is all of the recipe
    last_step    measures of the last line of its training's log
    scores       what it was measured by, and what came out
    """

    notes: Sequence[str] = ()
    recipe: str = ""
    inputs: Sequence[str] = ()
    recipe_part: str = ""
    last_step: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def model_card(
    model: Model, name: str, made: Made, *, license_name: str | None, is_of_transformers: bool
) -> str:
    """Return the card in Markdown, its front matter as the Hub reads it.

    name                of the repository, `owner/model`
    license_name        one of the Hub's names, such as apache-2.0; None leaves it out
    is_of_transformers  the folder is one of transformers
    """
    front: dict[str, Any] = {
        "library_name": "transformers" if is_of_transformers else "openblip",
        "pipeline_tag": pipeline_tag(model),
        "tags": ["blip", "openblip", *_task_tags(model)],
    }
    if license_name is not None:
        front["license"] = license_name
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        _what(model),
        _sizes(model),
        "## Use\n\n" + _use(model, name, is_of_transformers=is_of_transformers),
        "## How it was made\n\n" + _how(made),
        "## Scores\n\n" + _scores(made.scores),
        "## Limits\n\n"
        "What it knows is what its data say: it may describe, match and answer wrongly, and "
        "carries their biases. It should decide nothing about people.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def read_made(folder: Path) -> Made:
    """Read how a model was made.

    Raises ValueError for a log or scores that cannot be read.
    """
    card = folder / "README.md"
    text = card.read_text("utf-8") if card.is_file() else ""
    found = _RECIPE.search(text)
    log = _log_of(folder)
    scores: dict[str, Mapping[str, float]] = {}
    last_step: Mapping[str, float] = {}
    inputs: Sequence[str] = ()
    recipe_part = ""
    try:
        came_from = folder.parent / "lineage.json"
        if came_from.is_file():
            made = json.loads(came_from.read_text("utf-8"))["artifacts"].get(folder.name)
            if made is not None:
                inputs, recipe_part = made["inputs"], made["recipe"][0]
        if log is not None:
            logged = read_log(log)
            last_step = logged.losses[-1] if logged.losses else {}
            if logged.evaluations:
                best = max(logged.evaluations, key=lambda line: line["criterion"])
                chosen = best if folder.suffix == ".best" else logged.evaluations[-1]
                scores["on the recipe's `evaluation` data"] = chosen
        measured = folder.parent / "evaluation" / f"{folder.name}.json"
        if measured.is_file():
            scores |= _loop_scores(json.loads(measured.read_text("utf-8")))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: what lies beside it cannot be read: {error!r}") from error
    notes = [
        _without_paths(line.removeprefix("- ").rstrip("."))
        for line in text.partition("## ")[0].splitlines() + _section(text, "Conversion")
        if line.startswith("- ")
    ]
    recipe = _without_paths(found[1]) if found else ""
    return Made(notes, recipe, inputs, recipe_part, last_step, scores)


def _log_of(folder: Path) -> Path | None:
    name = folder.name.removesuffix(".best")
    places = folder.with_name(f"{name}.log.jsonl"), folder.parent / "logs" / f"{name}.jsonl"
    return next((path for path in places if path.is_file()), None)


def _loop_scores(report: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the scores of a file of `evaluation/` of a bootstrap loop or a quickstart."""
    scores: dict[str, Mapping[str, float]] = {}
    if "retrieval" in report:
        scores["retrieval of held-out images and texts, %, without fine-tuning"] = report[
            "retrieval"
        ]["reranked"]
        scores["captions of held-out images, without fine-tuning"] = report["captioning"]["scores"]
    if "num_judged" in report:
        scores["questions about held-out images"] = {
            "accuracy, %": report["accuracy"], "questions": report["num_judged"],
        }  # fmt: skip
    return scores


def _section(text: str, title: str) -> list[str]:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()


def _without_paths(text: str) -> str:
    """Shorten absolute paths to their last name: they tell of a machine, not of the model."""
    return _ABSOLUTE_PATH.sub("", text)


def _what(model: Model) -> str:
    able = {
        "decode": "writes captions",
        "text": "embeds images and texts",
        "pair": "judges whether a text fits an image",
    }
    match model:
        case Vqa():
            what = "answers questions about images"
        case Nlvr():
            what = "says whether a sentence is true of two images"
        case Blip():
            roles = model.config.text.roles
            does = [sentence for role, sentence in able.items() if role in roles]
            if model.config.reconstruction is not None:
                does.append("moves an image's embedding by a text")
            what = ", and ".join([*([", ".join(does[:-1])] if does[1:] else []), does[-1]])
    return f"A model of [BLIP](https://arxiv.org/abs/2201.12086) that {what}, made with openblip."


def _task_tags(model: Model) -> list[str]:
    match model:
        case Vqa():
            return ["visual-question-answering"]
        case Nlvr():
            return ["visual-reasoning"]
        case Blip():
            tags = {"decode": "image-captioning", "text": "image-text-retrieval",
                    "pair": "image-text-matching"}  # fmt: skip
            return [tag for role, tag in tags.items() if role in model.config.text.roles]


def _sizes(model: Model) -> str:
    vision, text = model.config.vision, model.config.text
    number = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        ("parameters", f"{number:,}"),
        ("images", f"{vision.image_size_px} px in patches of {vision.patch_size_px} px"),
        ("image encoder",
         f"{vision.num_layers} layers, {vision.num_heads} heads, width {vision.width}"),
        ("text model", f"{text.num_layers} layers, {text.num_heads} heads, width {text.width}"),
        ("vocabulary", f"{text.vocab_size:,} words"),
        ("roles", ", ".join(roles_of(model))),
        ("model id", f"`{model_id(model)}`"),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def _use(model: Model, name: str, *, is_of_transformers: bool) -> str:
    """Return what to type: in Python, on the command line, with transformers."""
    roles = model.config.text.roles if isinstance(model, Blip) else frozenset()
    match model:
        case Nlvr():
            return _block("", f"openblip evaluate nlvr {name} dev.json")
        case Vqa():
            call = 'print(engine.ask([Path("photo.jpg")], [["what is it?"]]))'
            command = f'openblip ask photo.jpg "what is it?" --model {name}'
        case _ if "decode" in roles:
            call = 'print(engine.caption([Path("photo.jpg")]))'
            command = f"openblip caption photos/ --model {name}"
        case _:
            call = 'print(engine.match([Path("photo.jpg")], [["a dog", "a cat"]]))'
            command = f'openblip match photo.jpg "a dog" "a cat" --model {name}'
    lines = [
        _block(
            "python",
            "from pathlib import Path\n\nimport openblip\n\n"
            f'engine = openblip.load_engine("{name}")\n{call}',
        ),
        _block("", command),
    ]
    can_be_converted = isinstance(model, Blip) and ("decode" in roles or {"text", "pair"} <= roles)
    if is_of_transformers:
        kind = (
            "BlipForQuestionAnswering"
            if isinstance(model, Vqa)
            else "BlipForConditionalGeneration"
            if "decode" in roles
            else "BlipForImageTextRetrieval"
        )
        code = (
            f"from transformers import BlipProcessor, {kind}\n\n"
            f'processor = BlipProcessor.from_pretrained("{name}")\n'
            f'model = {kind}.from_pretrained("{name}")'
        )
        lines.append("With transformers:\n\n" + _block("python", code))
    elif can_be_converted:
        command = (
            f"hf download {name} --local-dir model\nopenblip convert model theirs --to transformers"
        )
        lines.append("For transformers:\n\n" + _block("", command))
    return "\n\n".join(lines)


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"


def _how(made: Made) -> str:
    parts = ["\n".join(f"- {note}." for note in made.notes)] if made.notes else []
    facts = _facts(made)
    if facts:
        parts.append("\n".join(["| | |", "|---|---|", *facts]))
    if made.recipe:
        parts.append(f"The whole recipe:\n\n```yaml\n{made.recipe}```")
    return "\n\n".join(parts) or "Nothing is known of its training: tell it here."


def _facts(made: Made) -> list[str]:
    """Return rows: what it was made from by name, steps, and the last losses."""
    values = yaml.safe_load(made.recipe) if made.recipe else {}
    if isinstance(values, dict) and made.recipe_part:
        values = values.get(made.recipe_part)
    rows = [("made from", ", ".join(made.inputs))] if made.inputs else []
    if isinstance(values, dict):
        data = values.get("data")
        if isinstance(data, list):
            paths = [one.get("path", one) if isinstance(one, dict) else one for one in data]
            rows.append(("data", ", ".join(map(str, paths))))
        told = {"init": "starts from", "num_steps": "optimizer steps", "batch_size": "batch"}
        rows += [(what, str(values[key])) for key, what in told.items() if values.get(key)]
    if made.last_step:
        measures = (f"{key} {_number(value)}" for key, value in made.last_step.items())
        rows.append(("last logged step", ", ".join(measures)))
    return [f"| {what} | {value} |" for what, value in rows]


def _scores(scores: Mapping[str, Mapping[str, float]]) -> str:
    if not scores:
        return "It has been measured on nothing that is known here."
    tables = []
    for what, values in scores.items():
        head = f"| {what} | |\n|---|---|\n"
        tables.append(head + "\n".join(f"| {key} | {_number(v)} |" for key, v in values.items()))
    return "\n\n".join(tables)


def _number(value: object) -> str:
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
