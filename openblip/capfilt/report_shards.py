"""The shards of a CapFilt folder beside each other: keep rates and speed, and the odd ones."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from openblip.capfilt.report_text import percent, rate, seconds
from openblip.page import Html, note, paragraph, table
from openblip.page_charts import Counts, histograms

NUM_RATE_BINS = 20
"""Bins of the keep rate, over [0, 1]."""

NUM_ODD_SHARDS = 5
_MOST_SHARDS_SHOWN = 100


def keep_rate_by_shard(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by source, shards per bin of the keep rate, and those with the lowest.

    shards  as they stand in the report; one without captions of a source does not count there
    """
    sources = sorted({source for shard in shards for source in shard["captions"]}, reverse=True)
    result = {}
    for source in sources:
        counts = [0] * NUM_RATE_BINS
        rates = []
        for shard in shards:
            captions = shard["captions"].get(source)
            if captions is not None:
                kept = captions["keep_rate"]
                counts[min(NUM_RATE_BINS - 1, int(kept * NUM_RATE_BINS))] += 1
                rates.append(
                    {
                        "name": shard["name"],
                        "keep_rate": kept,
                        "kept": captions["kept"],
                        "judged": captions["judged"],
                    }
                )
        lowest = sorted(rates, key=lambda one: (one["keep_rate"], one["name"]))[:NUM_ODD_SHARDS]
        result[source] = {"num_shards": len(rates), "counts": counts, "lowest": lowest}
    return result


def throughput(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median speed over shards in images per second, and the slowest shards.

    shards  as they stand in the report; one without images or without a time does not count
    """
    timed = [shard for shard in shards if shard["num_images"] and shard["images_per_s"]]
    order = sorted(timed, key=lambda shard: (shard["images_per_s"], shard["name"]))
    return {
        "num_shards": len(timed),
        "median_images_per_s": median(s["images_per_s"] for s in timed) if timed else None,
        "slowest": [
            {name: shard[name] for name in ("name", "images_per_s", "num_images", "seconds")}
            for shard in order[:NUM_ODD_SHARDS]
        ],
    }


def shards_section(report: Mapping[str, Any]) -> list[Html]:
    """Return the part of the page that shows the shards.

    A few shards are a table. Of more, the odd ones stand above it.
    """
    odd = [*_keep_rates(report), *_speeds(report)] if report["num_shards"] > NUM_ODD_SHARDS else []
    return [*odd, *_all(report)]


def _keep_rates(report: Mapping[str, Any]) -> list[Html]:
    by_source = report["keep_rate_by_shard"]
    rows = [
        Counts(
            f"{source}: {values['num_shards']:,} shards; all captions "
            f"{percent(report['captions'][source]['keep_rate'])}",
            values["counts"],
        )
        for source, values in by_source.items()
    ]
    lowest = [
        [
            one["name"],
            source,
            percent(one["keep_rate"]),
            f"{one['kept']:,}",
            f"{one['judged']:,}",
        ]
        for source, values in by_source.items()
        for one in values["lowest"]
    ]
    header = ["shard", "written by", "keep rate", "kept", "judged"]
    return [
        histograms("Shards by keep rate", "keep rate of a shard", rows),
        note("A shard that stands apart is of other data, or something went wrong with it."),
        table("Shards with the lowest keep rates", header, lowest, num_text_columns=2),
    ]


def _speeds(report: Mapping[str, Any]) -> list[Html]:
    speed = report["throughput"]
    if speed["median_images_per_s"] is None:
        return []
    rows = [
        [
            one["name"],
            rate(one["images_per_s"]),
            f"{one['num_images']:,}",
            seconds(one["seconds"]),
        ]
        for one in speed["slowest"]
    ]
    return [
        table("Slowest shards", ["shard", "images per second", "images", "time"], rows),
        paragraph(
            f"The median of {speed['num_shards']:,} shards is "
            f"{rate(speed['median_images_per_s'])} images per second."
        ),
    ]


def _all(report: Mapping[str, Any]) -> list[Html]:
    sources = list(report["captions"])
    shards = report["shards"]
    rows = []
    for shard in shards[:_MOST_SHARDS_SHOWN]:
        shares = [shard["captions"].get(source, {}).get("keep_rate") for source in sources]
        rows.append(
            [
                shard["name"],
                f"{shard['num_images']:,}",
                f"{shard['num_images_kept']:,}",
                f"{sum(shard['bad'].values()):,}",
                *("–" if share is None else percent(share) for share in shares),
                seconds(shard["seconds"]),
                "–" if shard["images_per_s"] is None else rate(shard["images_per_s"]),
            ]
        )
    header = ["shard", "images", "with a kept caption", "unusable"]
    header += [*(f"{source} kept" for source in sources), "time", "images per second"]
    left_out = len(shards) - len(rows)
    more = [note(f"{left_out:,} more shards are in report.json.")] if left_out else []
    return [table("Shards", header, rows), *more]
