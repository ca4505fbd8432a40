"""What commands print: answers on stdout, as text or as one JSON document; the rest on stderr."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openblip.convert import ConversionReport


def say(message: str) -> None:
    """Print a message that is not the answer."""
    print(f"openblip: {message}", file=sys.stderr, flush=True)


def answer(result: object, text: str, *, as_json: bool) -> None:
    """Print the answer: the result as JSON, or the text that says the same."""
    print(json.dumps(result, ensure_ascii=False, indent=2) if as_json else text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of equal length: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )


def loop_text(results: Mapping[str, Any], out: Path) -> str:
    """Say what a bootstrap loop measured: the models side by side, and where its page lies."""
    models = results.get("ablation") or {name: results[name] for name in ("before", "after")}
    if "rounds" in results:
        first = dict(list(models.items())[:-1])
        models = first | {f"round {n}": scores for n, scores in enumerate(results["rounds"], 1)}
    measures = list(next(iter(models.values())))
    rows = [["", *models]]
    rows += [[name, *(f"{scores[name]:.3f}" for scores in models.values())] for name in measures]
    lines = [table(rows)]
    if results["filter"]:
        lines.append(
            f"filter: ROC-AUC {results['filter']['roc_auc']:.3f} against the known truth, "
            f"{100 * results['filter']['precision']:.1f} % of the web captions it keeps are true"
        )
    lines.append(f"{results['seconds']:.0f} s; open {out / 'report.html'}")
    return "\n".join(lines)


def quickstart_text(results: Mapping[str, Any], out: Path) -> str:
    """Say what a quickstart measured, and what to type to try its models."""
    vqa, test, index = results["vqa"], out / "world" / "test", out / "index"
    first, second = (f"--model {shlex.quote(str(out / name))}" for name in ("model", "vqa"))
    return "\n".join(
        [
            loop_text(results, out),
            f"{vqa['accuracy']:.1f} % of {vqa['num_questions']} questions about held-out scenes "
            "are answered right",
            "to try all of it:",
            f"    openblip index {shlex.quote(str(test))} {shlex.quote(str(index))} {first}",
            f"    openblip serve {first} {second} --index {shlex.quote(str(index))} "
            f"--run {shlex.quote(str(out))}",
        ]
    )


def run_text(result: Mapping[str, Any]) -> str:
    """Say what a training left."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in result["last_step"].items())
    lines = [
        f"{result['folder']}: {result['num_parameters']:,} parameters, roles "
        f"{', '.join(result['roles'])}, model id {result['model_id']}",
        f"{result['log']}: {losses}",
    ]
    if "best" in result:
        best = dict(result["best"])
        folder, step = best.pop("folder"), best.pop("step")
        scores = ", ".join(f"{name} {value:.4g}" for name, value in best.items())
        lines.append(f"{folder}: the best, of step {step}: {scores}")
    return "\n".join(lines)


def dry_text(result: Mapping[str, Any]) -> str:
    """Say what a training would cost."""
    hours, rest = divmod(round(result["seconds"]), 3600)
    about = "about " if result["is_estimate"] else ""
    return table(
        [
            ["parameters", f"{result['num_parameters']:,}, {result['num_trained']:,} trained"],
            ["memory of their state", f"{result['state_bytes'] / 1e6:,.0f} MB"],
            ["peak memory", f"{result['peak_bytes'] / 1e6:,.0f} MB"],
            ["an epoch", f"{about}{result['pairs_per_epoch']:,} pairs, "
                         f"{result['steps_per_epoch']:,.1f} steps"],
            ["a step", f"{result['flops_per_step'] / 1e9:,.1f} GFLOP, "
                       f"{result['seconds_per_step']:.3f} s"],
            ["all", f"{result['num_steps']:,} steps, {hours} h {rest // 60} min"],
        ]
    )  # fmt: skip


def capfilt_text(report: Mapping[str, Any], folder: Path) -> str:
    """Say what became of the captions, by source, and where the page lies."""
    rows = [["captions", "judged", "kept", "keep rate"]]
    reasons = list(dict.fromkeys(r for c in report["captions"].values() for r in c["dropped"]))
    rows[0] += reasons
    for source, counts in report["captions"].items():
        rate = f"{100 * counts['keep_rate']:.1f} %"
        dropped = [str(counts["dropped"].get(reason, 0)) for reason in reasons]
        rows.append([source, str(counts["judged"]), str(counts["kept"]), rate, *dropped])
    lines = [table(rows)]
    lines.append(
        f"{report['num_images_kept']} of {report['num_images']} images kept, of "
        f"{report['num_shards']} shards"
    )
    if report["bad"]:
        told = ", ".join(f"{reason} {number}" for reason, number in report["bad"].items())
        lines.append(f"not used: {told}")
    lines.append(f"open {folder / 'report.html'}")
    return "\n".join(lines)


def calibration_text(report: Mapping[str, Any], folder: Path | None) -> str:
    """Say what labelled pairs tell of a filter, and what was written."""
    half, scales = report["at_half"], (report["before"], report["after"])
    rows = [
        ["pairs", f"{report['num_matching']} matching, {report['num_wrong']} wrong"],
        ["ROC-AUC", f"{report['roc_auc']:.4f}"],
        ["average precision", f"{report['average_precision']:.4f}"],
        ["at 0.5", f"precision {_share(half['precision'])}, recall {half['recall']:.4f}, "
                   f"F1 {half['f1']:.4f}"],
        ["temperature", f"{report['temperature']:g}"],
    ]  # fmt: skip
    sides = [["", "before", "after"]]
    for name, key in (("calibration error", "ece"), ("Brier score", "brier"),
                      ("neg. log-likelihood", "negative_log_likelihood")):  # fmt: skip
        sides.append([name, *(f"{scale[key]:.4f}" for scale in scales)])
    if all(scale["smallest"] for scale in scales):
        wanted = f"threshold for precision {report['wanted_precision']:g}"
        sides.append([wanted, *(str(scale["smallest"]["threshold"]) for scale in scales)])
        for name, key in (("its recall", "recall"), ("its kept share", "kept_share")):
            sides.append([name, *(f"{scale['smallest'][key]:.4f}" for scale in scales)])
    lines = [table(rows), "", table(sides)]
    lines += [f"note: {note}" for note in report["notes"]]
    if report["saved"] is not None:
        lines.append(f"saved {report['saved']}")
    if folder is not None:
        lines.append(f"open {folder / 'calibration.html'}")
    return "\n".join(lines)


def conversion_text(report: "ConversionReport", target: Path) -> str:
    """Say what a conversion read, what it left out and why, and what its user must know."""
    lines = [
        f"{target}: {report.num_parameters:,} parameters, roles {', '.join(report.roles)}, "
        f"from {report.kind}"
    ]
    lines += [f"left out: {number} ({reason})" for reason, number in report.left_out.items()]
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
