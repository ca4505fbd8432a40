"""The commands that run stages: the whole loop, trainings; `cli` takes them up."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from openblip.cli_options import (
    DATA_HELP,
    AsJson,
    HasAblation,
    IsDry,
    NewFolder,
    Out,
    Overrides,
    Recipe,
)
from openblip.cli_output import answer, dry_text, loop_text, quickstart_text, run_text
from openblip.config import load_recipe
from openblip.data.sources import list_shards

finetune_app = typer.Typer(
    help="Fine-tune a pre-trained model for one task.", no_args_is_help=True, rich_markup_mode=None
)


def quickstart(
    out: Out,
    has_ablation: HasAblation = False,
    seed: Annotated[int, typer.Option(help="Of the drawn world and of all trainings.")] = 42,
    as_json: AsJson = False,
) -> None:
    """Run the whole loop on a drawn world, in minutes on a CPU.

    Pre-trains a model on noisy captions, fine-tunes captioner and filter, bootstraps the captions
    and pre-trains anew. Prints the scores before and after; report.html shows what happened. Then
    trains a head that moves a picture by a text and a model that answers questions, and prints what
    to type to try them all. A quickstart that was stopped goes on where it was.
    """
    from openblip.quickstart import quickstart as run

    results = run(out, seed=seed, has_ablation=has_ablation)
    answer(results, quickstart_text(results, out), as_json=as_json)


def draw(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; a new one.")],
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 42,
    as_json: AsJson = False,
) -> None:
    """Draw the quickstart's world: web, human and test images with captions, and questions.

    Data to try a training on. See recipes/world_cpu.yaml.
    """
    from openblip.quickstart import draw as run

    result = run(out, seed=seed)
    lines = [f"{folder}: {num} images" for folder, num in result.items()]
    answer(result, "\n".join(lines), as_json=as_json)


def bootstrap(
    recipe: Recipe,
    web: Annotated[str, typer.Option(help="Noisy image-text pairs. " + DATA_HELP)],
    human: Annotated[str, typer.Option(help="Images with human captions to fine-tune on.")],
    test: Annotated[str, typer.Option(help="Held-out images with human captions.")],
    out: Out,
    has_ablation: HasAblation = False,
    engine: Annotated[
        Literal["local", "pool"],
        typer.Option(
            help="Where CapFilt's shards are worked on: this process, or several of this machine."
        ),
    ] = "local",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes of the pool; 0 takes one per core.")
    ] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole loop of BLIP on your data.

    Pre-train, fine-tune captioner and filter, CapFilt, pre-train anew, compare; with `rounds` in
    the recipe, all but the first several times.

    Every stage leaves a folder in --out; a loop that was stopped goes on behind the last one.
    """
    from openblip.capfilt.bootstrap import BootstrapData, BootstrapRecipe
    from openblip.capfilt.bootstrap import bootstrap as run
    from openblip.capfilt.run import EngineChoice

    loop = load_recipe(BootstrapRecipe, recipe, overrides or ())
    for path in (web, human, test):
        list_shards(path)
    results = run(
        loop,
        BootstrapData(web, human, test),
        out,
        has_ablation=has_ablation,
        engine=EngineChoice(engine, workers),
    )
    answer(results, loop_text(results, out), as_json=as_json)


def pretrain(
    recipe: Recipe,
    out: NewFolder,
    overrides: Overrides = None,
    is_dry: IsDry = False,
    as_json: AsJson = False,
) -> None:
    """Pre-train a new model with ITC, ITM and LM.

    See recipes/pretrain.yaml.
    """
    from openblip.pretrain import PretrainRun, run_pretraining

    run = load_recipe(PretrainRun, recipe, overrides or ())
    _train(lambda: run_pretraining(run, out, is_dry=is_dry), is_dry=is_dry, as_json=as_json)


def _train(run: Callable[[], dict[str, Any]], *, is_dry: bool, as_json: bool) -> None:
    """Run a training as one of the processes that torchrun started; the first one answers."""
    from openblip.training.distributed import joined

    with joined() as ranks:
        result = run()
    if ranks.is_first:
        answer(result, dry_text(result) if is_dry else run_text(result), as_json=as_json)


@finetune_app.command("captioning")
def finetune_captioning(
    recipe: Recipe,
    out: NewFolder,
    overrides: Overrides = None,
    is_dry: IsDry = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model to write captions.

    See recipes/finetune_captioning.yaml.
    """
    from openblip.finetune.captioning import CaptioningRun, run_captioning

    run = load_recipe(CaptioningRun, recipe, overrides or ())
    _train(lambda: run_captioning(run, out, is_dry=is_dry), is_dry=is_dry, as_json=as_json)


@finetune_app.command("retrieval")
def finetune_retrieval(
    recipe: Recipe,
    out: NewFolder,
    overrides: Overrides = None,
    is_dry: IsDry = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model to match images and texts.

    CapFilt's filter is one of these. See recipes/finetune_retrieval.yaml.
    """
    from openblip.finetune.retrieval import RetrievalRun, run_retrieval

    run = load_recipe(RetrievalRun, recipe, overrides or ())
    _train(lambda: run_retrieval(run, out, is_dry=is_dry), is_dry=is_dry, as_json=as_json)


@finetune_app.command("reconstruction")
def finetune_reconstruction(
    recipe: Recipe,
    out: NewFolder,
    overrides: Overrides = None,
    is_dry: IsDry = False,
    as_json: AsJson = False,
) -> None:
    """Give a model a head that refines images by a text; all else of it stays.

    `openblip refine` uses it. See recipes/world_reconstruction_cpu.yaml.
    """
    from openblip.finetune.reconstruction import ReconstructionRun, run_reconstruction

    run = load_recipe(ReconstructionRun, recipe, overrides or ())
    _train(lambda: run_reconstruction(run, out, is_dry=is_dry), is_dry=is_dry, as_json=as_json)


@finetune_app.command("vqa")
def finetune_vqa(
    recipe: Recipe,
    out: NewFolder,
    overrides: Overrides = None,
    is_dry: IsDry = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model to answer questions about images.

    See recipes/finetune_vqa.yaml.
    """
    from openblip.finetune.vqa import VqaRun, run_vqa

    run = load_recipe(VqaRun, recipe, overrides or ())
    _train(lambda: run_vqa(run, out, is_dry=is_dry), is_dry=is_dry, as_json=as_json)


@finetune_app.command("nlvr")
def finetune_nlvr(
    recipe: Recipe,
    out: NewFolder,
    overrides: Overrides = None,
    is_dry: IsDry = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model to say whether a sentence is true of two images.

    See recipes/finetune_nlvr.yaml.
    """
    from openblip.finetune.nlvr import NlvrRun, run_nlvr

    run = load_recipe(NlvrRun, recipe, overrides or ())
    _train(lambda: run_nlvr(run, out, is_dry=is_dry), is_dry=is_dry, as_json=as_json)
