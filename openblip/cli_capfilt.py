"""The commands of CapFilt; `cli` takes them up."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from openblip.cli_options import DATA_HELP, MODEL_HELP, AsJson, DtypeOption, Overrides
from openblip.cli_output import answer, calibration_text, capfilt_text, say
from openblip.config import load_recipe
from openblip.data.sources import list_shards

if TYPE_CHECKING:
    from openblip.capfilt.work import Job

EXIT_FAILED_UNITS = 1

capfilt_app = typer.Typer(
    help="Caption the images of the web, and filter the captions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Source = Annotated[str, typer.Argument(metavar="INPUT", help=DATA_HELP)]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")]
Done = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that `capfilt run` wrote.")]
Captioners = Annotated[
    list[str],
    typer.Option(
        "--captioner", help="Model that writes; may be given several times. " + MODEL_HELP
    ),
]
Filters = Annotated[
    list[str],
    typer.Option("--filter", help="Model that judges; several judge together. " + MODEL_HELP),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML file; without one, the paper's settings."),
]
NumThreads = Annotated[
    int,
    typer.Option(
        "--threads",
        min=0,
        help="Of a worker; 0 divides the cores among a pool, and takes Ray's --cpus-per-worker.",
    ),
]
Device = Annotated[
    Literal["cpu", "cuda"], typer.Option(help="Where the models run; workers take GPUs in turn.")
]


@capfilt_app.command("run")
def capfilt_run(
    source: Source,
    output: Output,
    captioners: Captioners,
    filters: Filters,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    engine: Annotated[
        Literal["local", "pool", "ray", "slurm"],
        typer.Option(
            help="Where shards are worked on: this process, several of this machine, the actors "
            "of a Ray cluster, or as a task of a Slurm array. The output is the same."
        ),
    ] = "local",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes or actors; 0 takes one per GPU or core.")
    ] = 0,
    tasks: Annotated[int, typer.Option(min=0, help="Of the Slurm array, as `plan` writes it.")] = 0,
    threads: NumThreads = 0,
    device: Device = "cpu",
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, or `auto`; without one, Ray starts on this machine."),
    ] = None,
    cpus_per_worker: Annotated[
        float, typer.Option(min=0, help="That Ray reserves for an actor.")
    ] = 1.0,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="That Ray reserves for an actor, as 0.5.")
    ] = 0.0,
    is_forced: Annotated[
        bool, typer.Option("--force", help="Do shards anew that were done with other settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Caption every image, judge all captions, keep what fits.

    Per shard OUTPUT gets the images with their kept captions, all captions with their judgement,
    what could not be captioned with the reason, and a manifest; at the end a report. What is done
    already is not done again. Shards that cannot be read are named at the end, and the exit code
    is 1: the same command tries them once more.
    """
    from openblip.capfilt.report import write_capfilt_report
    from openblip.capfilt.run import EngineChoice, run_capfilt, with_threads

    choice = EngineChoice(engine, workers, tasks, address, cpus_per_worker, gpus_per_worker)
    job = _job(captioners, filters, recipe, overrides, output, threads, device)
    job = with_threads(job, choice)
    outcome = run_capfilt(source, job, choice, is_forced=is_forced)
    for name, reason in outcome.failed.items():
        say(f"not done: {name}: {reason}")
    if engine == "slurm":
        text = f"{outcome.num_units} units of this task, {len(outcome.failed)} not done"
        answer(outcome.to_json(), text, as_json=as_json)
    elif len(outcome.failed) < outcome.num_units:
        report = {**write_capfilt_report(output), **outcome.to_json()}
        answer(report, capfilt_text(report, output), as_json=as_json)
    else:
        answer(outcome.to_json(), "nothing was done", as_json=as_json)
    if outcome.failed:
        raise typer.Exit(EXIT_FAILED_UNITS)


@capfilt_app.command("plan")
def capfilt_plan(
    source: Source,
    output: Output,
    captioners: Captioners,
    filters: Filters,
    tasks: Annotated[int, typer.Option(min=1, help="Of the Slurm array.")],
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    threads: NumThreads = 8,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write a script that does a run as an array of Slurm tasks.

    OUTPUT/capfilt.sbatch, for a folder that all nodes see. Nothing is captioned yet. Add your
    cluster's partition, time and GPUs as options of sbatch.
    """
    from openblip.capfilt.run import check_cut, check_output, units_of, write_plan

    job = _job(captioners, filters, recipe, overrides, output, threads, device)
    units = units_of(source, job)
    check_output(units, output)
    check_cut(output, units, is_forced=False)
    command = [sys.executable, "-m", "openblip", "capfilt", "run", source, str(output)]
    for option, values in (
        ("--captioner", captioners), ("--filter", filters), ("--set", overrides or []),
        ("--recipe", [] if recipe is None else [str(recipe)]), ("--threads", [str(threads)]),
        ("--device", [device]), ("--engine", ["slurm"]), ("--tasks", [str(tasks)]),
    ):  # fmt: skip
        for value in values:
            command += [option, value]
    path = write_plan(output, tasks, command, max(1, threads))
    result = {"script": str(path), "num_units": len(units), "num_tasks": tasks}
    answer(result, f"{path}: {len(units)} units in {tasks} tasks; sbatch {path}", as_json=as_json)


@capfilt_app.command("retry")
def capfilt_retry(
    folder: Done,
    captioners: Captioners,
    filters: Filters,
    threads: NumThreads = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Caption and judge what failed, and nothing else.

    For images that were mended, or a server that was away. The settings are those of the run; the
    models must be too. What was left out by choice, as too small an image, stays out.
    """
    from openblip.capfilt.report import write_capfilt_report
    from openblip.capfilt.run import retry_capfilt

    num = retry_capfilt(folder, captioners, filters, threads, device)
    report = {**write_capfilt_report(folder), "num_retried": num}
    text = f"{num} images that had failed are captioned now\n{capfilt_text(report, folder)}"
    answer(report, text, as_json=as_json)


@capfilt_app.command("rethreshold")
def capfilt_rethreshold(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Folder that `capfilt run` wrote.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Another folder to write.")],
    threshold: Annotated[
        float | None, typer.Option(help="Least match probability, 0 to 1; 0 keeps all.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="Keep this share of all captions of the folder, the best judged ones; it sets "
            "the threshold."
        ),
    ] = None,
    sources: Annotated[
        str, typer.Option(help="Whose captions may stay: web, synthetic, human, with commas.")
    ] = "web,synthetic,human",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make another selection of judged captions, without a model.

    --set takes the other keys of the rule, as best=1 or near=0.8; see docs/capfilt.md.
    """
    from openblip.capfilt.keep import KeepRule
    from openblip.capfilt.manifest import some_manifests
    from openblip.capfilt.report import write_capfilt_report
    from openblip.capfilt.run import threshold_of_share
    from openblip.capfilt.shard import rethreshold_shard

    if (threshold is None) == (share is None):
        raise ValueError("give either --threshold or --share")
    if output.resolve() == source.resolve():
        raise ValueError(f"{output} holds the input: choose another folder")
    given = [f"sources=[{sources}]", *(overrides or ())]
    rule = load_recipe(KeepRule, None, [*given, f"threshold={threshold or 0.0}"])
    done = some_manifests(source)
    if share is not None:
        rule = rule.model_copy(update={"threshold": threshold_of_share(done, rule.sources, share)})
    for manifest in done:
        rethreshold_shard(manifest, output, rule)
    report = write_capfilt_report(output)
    answer(report, capfilt_text(report, output), as_json=as_json)


@capfilt_app.command("report")
def capfilt_report(folder: Done, as_json: AsJson = False) -> None:
    """Sum up what CapFilt did.

    Writes report.json and report.html into the folder.
    """
    from openblip.capfilt.report import write_capfilt_report

    report = write_capfilt_report(folder)
    answer(report, capfilt_text(report, folder), as_json=as_json)


@capfilt_app.command("calibrate")
def capfilt_calibrate(
    judge: Annotated[str, typer.Option("--filter", help="Model that judges. " + MODEL_HELP)],
    labels: Annotated[
        str,
        typer.Option(
            help="Pairs of known truth: JSON lines with an image (path, URL or base64), a caption "
            "and a label, true or false, 1 or 0. Other data sets with such a field do too."
        ),
    ],
    precision: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of matching pairs that a threshold is sought for."),
    ] = 0.95,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for calibration.html and calibration.json; none by default."),
    ] = None,
    is_saved: Annotated[
        bool,
        typer.Option("--save", help="Put the temperature into the filter's folder, a local one."),
    ] = False,
    dtype: DtypeOption = "float32",
    as_json: AsJson = False,
) -> None:
    """Compare a filter with pairs of known truth, choose its threshold, fit its temperature.

    Tells ROC-AUC, average precision, what thresholds keep, and the smallest one that reaches the
    wanted precision. The temperature makes the match probability right as often as it says, and
    changes no order. Pairs that cannot be used are counted on stderr, by reason.
    """
    from openblip.capfilt.calibration import calibrate, save_temperature
    from openblip.capfilt.calibration_page import write_calibration
    from openblip.capfilt.filter import Filter
    from openblip.capfilt.labelled import judge_labelled
    from openblip.hub import load

    folder = Path(judge)
    list_shards(labels)
    if is_saved and not folder.is_dir():
        raise ValueError(f"{judge} is no local folder: leave --save out, or download it first")
    if out is not None and (out / "config.json").exists():
        # The report has the name of a saved temperature, and would be taken for a damaged one.
        raise ValueError(f"{out} holds a model: choose another folder for the report")
    reader = Filter(*load(judge), dtype)
    pairs = judge_labelled(labels, reader)
    if pairs.bad:
        told = ", ".join(f"{reason} {number}" for reason, number in pairs.bad.items())
        say(f"not used: {told}")
    result = calibrate(pairs.probabilities, pairs.labels, precision)
    if out is not None:
        write_calibration(out, result, model=reader.model, labels=labels, bad=pairs.bad)
    saved = save_temperature(folder, result, reader.model) if is_saved else None
    report = {
        "filter": judge, "model": reader.model, "labels": labels, "bad": dict(pairs.bad),
        **result.to_json(), "saved": None if saved is None else str(saved),
    }  # fmt: skip
    answer(report, calibration_text(report, out), as_json=as_json)


def _job(
    captioners: list[str],
    filters: list[str],
    recipe: Path | None,
    overrides: list[str] | None,
    output: Path,
    threads: int,
    device: str,
) -> "Job":
    from openblip.capfilt.recipe import CapfiltRecipe
    from openblip.capfilt.work import Job

    settings = load_recipe(CapfiltRecipe, recipe, overrides or ())
    return Job(tuple(captioners), tuple(filters), settings, output, threads, device)
