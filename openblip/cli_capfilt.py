"""The commands of CapFilt; `cli` takes them up."""

from pathlib import Path
from typing import Annotated

import typer

from openblip.cli_options import DATA_HELP, MODEL_HELP, AsJson, DtypeOption, Overrides
from openblip.cli_output import answer, calibration_text, capfilt_text, say
from openblip.config import load_recipe
from openblip.data.sources import list_shards

capfilt_app = typer.Typer(
    help="Caption the images of the web, and filter the captions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@capfilt_app.command("run")
def capfilt_run(
    source: Annotated[str, typer.Argument(metavar="INPUT", help=DATA_HELP)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    captioner: Annotated[str, typer.Option(help="Model that writes. " + MODEL_HELP)],
    judge: Annotated[str, typer.Option("--filter", help="Model that judges. " + MODEL_HELP)],
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file; without one, the paper's settings.")
    ] = None,
    overrides: Overrides = None,
    is_forced: Annotated[
        bool, typer.Option("--force", help="Do shards anew that were done with other settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Caption every image, judge all captions, keep what fits.

    Per shard OUTPUT gets the images with their kept captions, all captions with their judgement,
    and a manifest; at the end a report. What is done already is not done again.
    """
    from openblip.capfilt.captioner import Captioner
    from openblip.capfilt.filter import Filter
    from openblip.capfilt.report import write_capfilt_report
    from openblip.capfilt.shard import CapfiltRecipe, OutputPaths, process_shard
    from openblip.hub import load

    settings = load_recipe(CapfiltRecipe, recipe, overrides or ())
    shards = list_shards(source)
    for path in [shard.path for shard in shards if not shard.is_remote]:
        home = path.resolve() if path.is_dir() else path.resolve().parent
        if output.resolve() == home or (path.is_dir() and output.resolve().is_relative_to(home)):
            raise ValueError(f"{output} holds the input, {path}: choose another folder")
    writer = Captioner(
        *load(captioner),
        settings.decoding,
        settings.prompt,
        settings.captions_per_image,
        settings.seed,
        settings.dtype,
    )
    reader = Filter(*load(judge), settings.dtype)
    for shard in shards:
        try:
            process_shard(shard, output, writer, reader, settings)
        except ValueError:
            manifest = OutputPaths.of(shard.stem, output).manifest
            if not is_forced or not manifest.exists():
                raise
            manifest.unlink()
            process_shard(shard, output, writer, reader, settings)
    report = write_capfilt_report(output)
    answer(report, capfilt_text(report, output), as_json=as_json)


@capfilt_app.command("rethreshold")
def capfilt_rethreshold(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Folder that `capfilt run` wrote.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Another folder to write.")],
    threshold: Annotated[float, typer.Option(help="Least match probability, 0 to 1; 0 keeps all.")],
    sources: Annotated[
        str, typer.Option(help="Whose captions may stay: web, synthetic, human, with commas.")
    ] = "web,synthetic,human",
    as_json: AsJson = False,
) -> None:
    """Make another selection of judged captions, without a model."""
    from openblip.capfilt.filter import KeepRule
    from openblip.capfilt.report import write_capfilt_report
    from openblip.capfilt.shard import manifests, rethreshold_shard

    rule = load_recipe(KeepRule, None, [f"threshold={threshold}", f"sources=[{sources}]"])
    if output.resolve() == source.resolve():
        raise ValueError(f"{output} holds the input: choose another folder")
    done = manifests(source)
    if not done:
        raise ValueError(f"{source} holds no shard that `openblip capfilt run` did")
    for manifest in done:
        rethreshold_shard(manifest, output, rule)
    report = write_capfilt_report(output)
    answer(report, capfilt_text(report, output), as_json=as_json)


@capfilt_app.command("report")
def capfilt_report(
    folder: Annotated[Path, typer.Argument(help="Folder that `capfilt run` wrote.")],
    as_json: AsJson = False,
) -> None:
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
