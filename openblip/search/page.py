"""HTML pages of what was found, and of an index's clusters."""

import json
from collections.abc import Sequence
from pathlib import Path

from openblip import page
from openblip.images import ImageDecodeError
from openblip.page import Badge, CardLine, Html, Section
from openblip.search.cluster import Cluster
from openblip.search.index import Index
from openblip.search.query import Query, Results

SHOWN_PER_CLUSTER = 8
MOST_SHOWN = 100


def write_results(path: Path, index: Index, query: Query, results: Results) -> None:
    """Write a page of the hits of a search, with their pictures and scores."""
    shown = results.hits[:MOST_SHOWN]
    pictures = dict(index.places.read_all(index.places_of([hit.number for hit in shown])))
    cards = []
    for place, hit in enumerate(shown):
        badges = [Badge(f"similarity {hit.similarity:.3f}")]
        if hit.match_probability is not None:
            told = f"match {hit.match_probability:.3f}"
            badges.append(Badge(told, "good" if hit.match_probability >= 0.5 else "bad"))
        texts = [str(one["text"]) for one in hit.metadata["captions"]][:3]
        line = CardLine("captions" if texts else "no captions", texts, badges)
        cards.append(page.card(_picture(pictures[place], hit.key), hit.key, [line]))
    sought = " and ".join(
        [f"“{query.text}”"] * (query.text is not None) + ["a picture"] * (query.image is not None)
    )
    lead = [
        page.paragraph(f"{len(shown)} of {results.num_searched:,} images for {sought}: "
                       f"{results.method}."),
    ]  # fmt: skip
    if query.where:
        lead.append(page.note(f"Where {' and '.join(query.where)}."))
    if results.unreadable:
        lead.append(
            page.note(f"{len(results.unreadable)} images are no longer where they were indexed.")
        )
    page.write_page(path, f"Search: {sought}", lead, [Section("Found", [page.cards("", cards)])])


def write_clusters(
    path: Path,
    index: Index,
    groups: Sequence[tuple[int, ...]],
    found: Sequence[Cluster],
) -> None:
    """Write a page of near-duplicate groups and clusters, some pictures of each."""
    sections = []
    if groups:
        num_spare = sum(len(group) - 1 for group in groups)
        parts = [page.note(f"{num_spare} images are near-duplicates of another one.")]
        parts += [_cards(index, group, f"{len(group)} alike") for group in groups[:MOST_SHOWN]]
        sections.append(Section("Near-duplicates", parts))
    for number, cluster in enumerate(found[:MOST_SHOWN], start=1):
        title = f"Cluster {number}: {len(cluster.numbers)} images"
        sections.append(Section(title, [_cards(index, cluster.numbers, "")]))
    lead = [page.paragraph(f"{len(index):,} images of {index.folder.name}.")]
    page.write_page(path, f"Clusters of {index.folder.name}", lead, sections)


def _cards(index: Index, numbers: Sequence[int], title: str) -> Html:
    shown = numbers[:SHOWN_PER_CLUSTER]
    pictures = dict(index.places.read_all(index.places_of(shown)))
    cards = []
    for place, number in enumerate(shown):
        row = index.row(number)
        texts = [str(one["text"]) for one in json.loads(row["captions"])][:2]
        line = CardLine("captions" if texts else "no captions", texts)
        cards.append(page.card(_picture(pictures[place], row["key"]), row["key"], [line]))
    return page.cards(title, cards)


def _picture(data: bytes | None, key: str) -> Html:
    if data is None:
        return page.no_picture("no longer there")
    try:
        return page.picture(data, key)
    except ImageDecodeError as error:
        return page.no_picture(error.reason)
