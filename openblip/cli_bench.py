"""`openblip bench`: parse, call, print, as in `cli`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openblip.cli_options import MODEL_HELP, AsJson
from openblip.cli_output import answer, say, table
from openblip.data.sinks import write_bytes_atomically, write_json_atomically

if TYPE_CHECKING:
    from openblip.bench import Row
    from openblip.inference import Engine
    from openblip.kernels import Precision


def bench(
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} By default one of random weights.")
    ] = None,
    size: Annotated[
        Literal["base", "tiny"], typer.Option(help="Of the model of random weights.")
    ] = "base",
    image_size: Annotated[int, typer.Option(min=16, help="Side of its images in pixels.")] = 384,
    dtypes: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            help="Precision to measure; may be given several times. By default float32 and "
            "bfloat16, and without --against also int8.",
        ),
    ] = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--work", help="Measure what has this in its name; several times for more."),
    ] = None,
    against: Annotated[
        Literal["transformers"] | None, typer.Option(help="Do the same work by this library, too.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Runs of each work.")] = 2,
    budget_s: Annotated[
        float, typer.Option(min=1, help="Seconds after which no further work begins.")
    ] = 840.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the processor; by default PyTorch's choice.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(help="SVG file to draw the ratios of --against into.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the JSON into as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what this machine gets out of a model, and explain what --dtype auto takes.

    Captions have 20 tokens each, texts 13 on average. With --against transformers the same weights
    do the same work there, in turns; a ratio above 1 says how many times faster openblip is. int8
    is compared with float32 there. Equal results in float32 are made sure of before.
    """
    result, text, rows = _measure(
        model, size, image_size, dtypes, chosen, against, rounds, budget_s, threads
    )
    if chart is not None:
        from openblip.bench_chart import ratio_chart

        if against is None:
            raise ValueError("--chart draws ratios: give --against transformers as well")
        write_bytes_atomically(chart, ratio_chart(rows).encode())
    if out is not None:
        write_json_atomically(out, result)
    answer(result, text, as_json=as_json)


def _measure(
    model: str | None,
    size: str,
    image_size: int,
    dtypes: Sequence[str] | None,
    chosen: Sequence[str] | None,
    against: str | None,
    rounds: int,
    budget_s: float,
    threads: int | None,
) -> tuple[dict[str, Any], str, list["Row"]]:
    import time

    import torch

    from openblip import bench as measures
    from openblip.hub import load
    from openblip.inference import Engine
    from openblip.kernels import best_precision
    from openblip.training.log import ProgressLine

    deadline = time.monotonic() + budget_s
    precisions = _precisions(dtypes, against)
    if threads is not None:
        torch.set_num_threads(threads)
    blip, tokenizer = measures.random_model(size, image_size) if model is None else load(model)
    peer = None
    if against is not None:
        from openblip.bench_peer import Peer, check_equal

        peer = Peer(blip, tokenizer)
        check_equal(Engine(blip, tokenizer, dtype="float32"), peer)
    rows: list[Row] = []
    limits: dict[str, Any] = {}
    vision = blip.config.vision
    rates = {
        name: measures.product_rates(name, 1 + vision.num_patches, vision.width)
        for name in _precisions(None, None)
    }
    with ProgressLine("bench", None, unit="works") as progress:
        for precision in precisions:
            engine = Engine(blip, tokenizer, dtype=precision, batch_size=8)
            works = [
                work
                for work in measures.works(engine, Engine(blip, tokenizer, dtype=precision))
                if not chosen or any(part in work.name for part in chosen)
            ]
            if peer is not None:
                peer.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
            theirs = {} if peer is None else peer.works()
            for row in measures.measure(
                works, theirs, precision, rounds=rounds, deadline=deadline, on_row=say
            ):
                rows.append(row)
                progress.advance(1)
            limits[precision] = _limits(engine, rows, max(rates[precision].values()))
            del engine, works
    lines = measures.advice(rates, best_precision(blip.device))
    result = {
        "model": model or f"random {size}, {image_size} px",
        "threads": torch.get_num_threads(),
        "against": against,
        "rows": [row.to_json() for row in rows],
        "limits": limits,
        "product_rates": rates,
        "advice": lines,
    }
    return result, _text(rows, limits, lines, against), rows


def _precisions(names: Sequence[str] | None, against: str | None) -> "list[Precision]":
    known: list[Precision] = ["float32", "bfloat16", "int8"]
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"--dtype {', '.join(sorted(unknown))}: known are {', '.join(known)}")
    if names is None:
        return known if against is None else known[:2]
    return [name for name in known if name in names]


def _limits(engine: "Engine", rows: "Sequence[Row]", peak: float) -> dict[str, float]:
    """Return how near the image encoder and the decoder come to what the machine can do.

    peak  the best rate of an image's products
    """
    import io

    from PIL import Image

    from openblip import bench as measures

    precision, config = engine.precision, engine.backend.config
    buffer = io.BytesIO()
    Image.effect_noise((500, 375), 60).convert("RGB").save(buffer, "JPEG")
    limits = {
        "first_caption_s": measures.first_caption_seconds(engine, buffer.getvalue()),
        "matrix_peak_per_s": peak,
    }
    for row in rows:
        if row.precision == precision and row.name.startswith("image encoder") and row.per_second:
            flops = measures.encoder_flops(config.vision) * row.per_second
            limits["encoder_share_of_peak"] = flops / peak
    step = measures.step_seconds(engine)
    read = measures.decoder_bytes(config.text, precision) / step
    bandwidth = measures.copy_bandwidth()
    return limits | {
        "step_s": step,
        "copy_bandwidth_per_s": bandwidth,
        "step_share_of_bandwidth": read / bandwidth,
    }


def _text(
    rows: "Sequence[Row]",
    limits: Mapping[str, Mapping[str, float]],
    advice: Sequence[str],
    against: str | None,
) -> str:
    shown = [["work", "dtype", "rate", "s", *([against, "ratio"] if against else []), "peak GiB"]]
    for row in rows:
        if row.seconds is None:
            cells = ["not measured: out of time", "", *(["", ""] if against else []), ""]
        else:
            peer = [] if against is None else [_number(row.peer_seconds), _number(row.ratio)]
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}"
            cells = [f"{row.per_second:.3g} {row.unit}/s", f"{row.seconds:.3g}", *peer, peak]
        shown.append([row.name, row.precision, *cells])
    lines = [table(shown), ""]
    for precision, values in limits.items():
        share = values.get("encoder_share_of_peak")
        told = "" if share is None else f"image encoder at {share:.0%} of it, "
        lines.append(
            f"{precision}: products at {values['matrix_peak_per_s'] / 1e9:,.0f} GFLOP/s, {told}a "
            f"decoding step in {1e3 * values['step_s']:.1f} ms, "
            f"{values['step_share_of_bandwidth']:.0%} of the copy bandwidth; from file to caption "
            f"in {values['first_caption_s']:.2f} s"
        )
    return "\n".join([*lines, *advice])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
