"""`openblip index`, `search` and `cluster`: parse, call, print, as in `cli`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from openblip.cli_options import (
    DATA_HELP,
    MODEL_HELP,
    AsJson,
    DtypeOption,
    ModelOption,
    StoreKindOption,
)
from openblip.cli_output import answer, say, table

if TYPE_CHECKING:
    from openblip.search.index import Index

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="Condition on what is known of the images: a field, one of = != < <= > >= ~ "
        "(contains), a value, as 'width>=300' or 'caption~dog'. Several: all of them."
    ),
]


class _IndexCommands(TyperGroup):
    """`openblip index SOURCE INDEX` is `openblip index add SOURCE INDEX`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_own = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if is_own else ["add", *args])


index_app = typer.Typer(
    cls=_IndexCommands,
    help="Index images, to search them: `openblip index SOURCE INDEX --model MODEL`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@index_app.command("add")
def add(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=DATA_HELP)],
    index: IndexFolder,
    model: ModelOption,
    has_states: Annotated[
        bool,
        typer.Option(
            "--states",
            help="Keep the image states too: ITM then re-ranks without the images. 0.9 MB an image "
            "at base size.",
        ),
    ] = False,
    is_pruned: Annotated[
        bool, typer.Option("--prune", help="Delete what SOURCE holds no more.")
    ] = False,
    commit_images: Annotated[
        int, typer.Option(min=1, help="Images that are committed together.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are embedded together.")] = 16,
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Add images to an index, and make it if there is none.

    Images that are in it already are left alone, changed ones replaced. What was committed stays
    when the command is stopped, and the same command goes on.
    """
    from openblip.data.sources import list_shards
    from openblip.hub import load_engine_with_id
    from openblip.search.add import add_source
    from openblip.search.writer import IndexWriter

    list_shards(source)
    engine, model_id = load_engine_with_id(model, dtype=dtype)
    width = engine.backend.config.embedding_width
    address = str(Path(model).resolve()) if Path(model).is_dir() else model
    with IndexWriter(index, model=address, model_id=model_id, embedding_width=width) as writer:
        report = add_source(
            writer, engine, source, commit_images=commit_images, batch_size=batch_size,
            has_states=has_states, is_pruned=is_pruned,
            on_bad=lambda key, reason: say(f"not indexed: {key}: {reason}"),
        )  # fmt: skip
    lines = [
        f"{index}: {report.num_added} images added, {report.num_replaced} replaced, "
        f"{report.num_unchanged} unchanged, {report.num_pruned} pruned; {report.num_images} in all"
    ]
    lines += [f"not indexed: {reason} {number}" for reason, number in report.bad.items()]
    answer(report.to_json(), "\n".join(lines), as_json=as_json)


@index_app.command("delete")
def delete(
    index: IndexFolder,
    keys: Annotated[
        Path | None, typer.Option(help="File with the key of an image in each line.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option(help="Key of an image. Several.")] = None,
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Delete images from an index, by their keys or by a condition. The files stay."""
    from openblip.search.where import matching
    from openblip.search.writer import IndexWriter

    named = list(key or [])
    if keys is not None:
        named += [line for line in keys.read_text("utf-8").splitlines() if line]
    if not named and not where:
        raise ValueError("nothing to delete: give --key, --keys or --where")
    with IndexWriter.of(index) as writer:
        known = writer.index.known()
        numbers = {known[one].number for one in named if one in known}
        if where:
            live = matching(writer.index, where) & writer.index.is_live
            numbers |= set(live.nonzero()[0].tolist())
        absent = [one for one in named if one not in known]
        if numbers:
            writer.delete(sorted(numbers))
        left = len(writer.index)
    result = {"num_deleted": len(numbers), "num_images": left, "absent": absent}
    text = f"{index}: {len(numbers)} images deleted, {left} left"
    if absent:
        text += f"\nnot in the index: {len(absent)}, as {absent[0]}"
    answer(result, text, as_json=as_json)


@index_app.command("merge")
def merge(
    index: IndexFolder,
    others: Annotated[
        list[Path], typer.Argument(metavar="OTHERS", help="Indexes whose images are added.")
    ],
    as_json: AsJson = False,
) -> None:
    """Add the images of other indexes, of the same model; keys that are there stay as they are."""
    from openblip.search.index import Index
    from openblip.search.writer import IndexWriter

    opened = [Index.open(other) for other in others]
    with IndexWriter.of(index) as writer:
        added = [writer.merge(other) for other in opened]
        total = len(writer.index)
    result = {"num_added": sum(added), "num_images": total}
    answer(result, f"{index}: {sum(added)} images added; {total} in all", as_json=as_json)


@index_app.command("compact")
def compact(index: IndexFolder, as_json: AsJson = False) -> None:
    """Write an index anew as one piece, without what was deleted."""
    from openblip.search.writer import IndexWriter

    with IndexWriter.of(index) as writer:
        before = writer.index.num_rows, len(writer.index.state.segments)
        writer.compact()
        after = len(writer.index)
    result = {"num_rows_before": before[0], "num_segments_before": before[1], "num_images": after}
    text = f"{index}: {before[0]} rows of {before[1]} segments are {after} rows of one"
    answer(result, text, as_json=as_json)


@index_app.command("show")
def show(
    index: IndexFolder,
    is_verified: Annotated[
        bool, typer.Option("--verify", help="Read all files, and compare their checksums.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what an index holds."""
    from openblip.search.index import SEGMENTS, Index
    from openblip.search.stores import STORES

    opened = Index.open(index)
    state = opened.state
    num_bytes = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
    addresses = opened.column("address").unique().to_pylist()
    if is_verified and (damaged := opened.damaged()):
        raise ValueError(
            f"{index} is damaged: the files of {len(damaged)} segments are not what was written, "
            f"as {index / SEGMENTS / damaged[0]}; make it anew"
        )
    stores = sorted(path.name for path in (index / STORES).glob("[!.]*"))
    result = {
        "num_images": len(opened), "num_deleted": opened.num_rows - len(opened),
        "num_segments": len(state.segments), "generation": state.generation,
        "model": state.model, "model_id": state.model_id, "num_bytes": num_bytes,
        "sources": addresses, "stores": stores,
    }  # fmt: skip
    rows = [
        ["images", f"{len(opened):,}"],
        ["deleted, not compacted", f"{opened.num_rows - len(opened):,}"],
        ["segments", str(len(state.segments))],
        ["model", f"{state.model} ({state.model_id})"],
        ["size", f"{num_bytes / 1e6:,.1f} MB"],
        ["sources", f"{len(addresses)}, as {addresses[0]}" if addresses else "none"],
        ["stores", ", ".join(stores) or "none"],
    ]
    answer(result, table(rows), as_json=as_json)


@index_app.command("store")
def store(
    index: IndexFolder,
    kind: Annotated[StoreKindOption, typer.Option(help="What the embeddings are copied into.")],
    address: Annotated[
        str,
        typer.Option(
            "--at", help="LanceDB: folder or URL, by default in the index; Qdrant: the server's."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Make a store that finds the nearest of many images faster: for millions of them.

    It is made for the index as it is now, and has to be made anew when that changes.
    """
    from openblip.search.index import Index
    from openblip.search.stores import build_store

    opened = Index.open(index)
    start = time.perf_counter()
    file = build_store(opened, kind, address)
    seconds = time.perf_counter() - start
    result = {**asdict(file), "num_images": len(opened), "seconds": seconds}
    answer(result, f"{index}: {len(opened)} images in {kind}, {seconds:.1f} s", as_json=as_json)


def search(
    index: IndexFolder,
    text: Annotated[str | None, typer.Option(help="What the images sought show.")] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Image that those sought are like; with --text, changed by the text if the model "
            "can refine, else both count alike."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} By default the one that made the index.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images that are wanted.")] = 20,
    shortlist: Annotated[int, typer.Option(min=1, help="Images that ITM re-ranks.")] = 128,
    is_reranked: Annotated[
        bool, typer.Option("--rerank/--no-rerank", help="Let ITM re-rank what a text finds.")
    ] = True,
    where: Where = None,
    store: Annotated[
        StoreKindOption | None,
        typer.Option(help="Store that finds the shortlist; by default all images are compared."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the pictures.")] = None,
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Find images of an index by a text, by an image, or by both."""
    from openblip.data.files import prepare_image
    from openblip.hub import load_engine_with_id
    from openblip.search.index import Index
    from openblip.search.page import write_results
    from openblip.search.query import Query, Searcher
    from openblip.search.stores import open_store

    opened = Index.open(index)
    data = None if image is None else image.read_bytes()
    engine, model_id = load_engine_with_id(model or opened.state.model, dtype=dtype)
    pixels = None
    if data is not None and image is not None:
        pixels = prepare_image(data, image, engine.image_size_px)
    query = Query(text, pixels, limit, shortlist, is_reranked, tuple(where or ()))
    found = None if store is None else open_store(opened, store)
    results = Searcher(engine, opened, found, model_id=model_id).search(query)
    for key in results.unreadable:
        say(f"not judged: {key} is no longer where it was indexed")
    if html is not None:
        write_results(html, opened, query, results)
        say(f"open {html}")
    lines = [f"{'match':>7}  {'similarity':>10}  key"]
    for hit in results.hits:
        match = "-" if hit.match_probability is None else f"{hit.match_probability:.4f}"
        lines.append(f"{match:>7}  {hit.similarity:10.4f}  {hit.key}")
    lines.append(f"{results.num_searched} images: {results.method}")
    answer(asdict(results), "\n".join(lines), as_json=as_json)


def cluster(
    index: IndexFolder,
    num_clusters: Annotated[
        int | None,
        typer.Option("--clusters", min=1, help="By default the root of half the images."),
    ] = None,
    min_similarity: Annotated[
        float, typer.Option(help="Cosine that the embeddings of near-duplicates have at least.")
    ] = 0.95,
    max_hash_bits: Annotated[
        int,
        typer.Option(
            min=-1,
            max=3,
            help="Bits of 64 in which their looks differ at most; -1: not asked.",
        ),
    ] = 3,
    duplicates: Annotated[
        Path | None,
        typer.Option(
            help="Also write the keys of all but one of each group, for `index delete --keys`."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first centres.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find near-duplicates in an index, and divide it into clusters."""
    from openblip.data.sinks import write_bytes_atomically
    from openblip.search.cluster import clusters, duplicate_groups
    from openblip.search.index import Index
    from openblip.search.page import write_clusters

    opened = Index.open(index)
    if not len(opened):
        raise ValueError(f"{index} holds no images")
    groups = duplicate_groups(opened, min_similarity=min_similarity, max_hash_bits=max_hash_bits)
    num = num_clusters or max(1, round((len(opened) / 2) ** 0.5))
    found = clusters(opened, num, seed=seed)
    if duplicates is not None:
        spare = [opened.key(number) for group in groups for number in group[1:]]
        write_bytes_atomically(duplicates, "".join(f"{key}\n" for key in spare).encode())
    if html is not None:
        write_clusters(html, opened, groups, found)
        say(f"open {html}")
    answer(
        {
            "duplicates": [_keys(opened, group) for group in groups],
            "clusters": [_keys(opened, one.numbers) for one in found],
        },
        _cluster_text(opened, groups, [one.numbers for one in found]),
        as_json=as_json,
    )


def _keys(index: "Index", numbers: tuple[int, ...]) -> list[str]:
    return [index.key(number) for number in numbers]


def _cluster_text(
    index: "Index", groups: list[tuple[int, ...]], found: list[tuple[int, ...]]
) -> str:
    spare = sum(len(group) - 1 for group in groups)
    lines = [f"{len(groups)} groups of near-duplicates: {spare} images could go"]
    lines += [f"  {', '.join(_keys(index, group[:5]))}" for group in groups[:10]]
    lines += [f"{len(found)} clusters"]
    for numbers in found[:20]:
        captions = index.metadata(numbers[0])["captions"]
        told = f": {captions[0]['text']}" if captions else ""
        lines.append(f"  {len(numbers):6d} images around {index.key(numbers[0])}{told}")
    return "\n".join(lines)
