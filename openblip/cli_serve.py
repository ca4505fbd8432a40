"""`openblip serve`: parse, call, as in `cli`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from openblip.cli_options import MODEL_HELP, DtypeOption, StoreKindOption

TOKENS_VARIABLE = "OPENBLIP_TOKENS"


def serve(
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="[NAME=]MODEL",
            help=f"{MODEL_HELP} May be given several times; what one cannot do, another does.",
        ),
    ],
    index: Annotated[
        Path | None,
        typer.Option(help="Index of pictures to search, made by `openblip index` with a --model."),
    ] = None,
    store: Annotated[
        StoreKindOption | None,
        typer.Option(
            help="Store of the index, made by `openblip index store`; by default all images are "
            "compared."
        ),
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--run", help="Folder of a run whose reports and curves the page shows. Several."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    dtype: DtypeOption = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that a model works on together; by default what fits."),
    ] = None,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, help="Of a whole request.")] = 20.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Of a picture.")] = 89.0,
    max_active: Annotated[
        int, typer.Option(min=1, help="Requests at once; more are asked to come back (429).")
    ] = 64,
    answer_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 60.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds for what is accepted, once told to stop.")
    ] = 60.0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a bearer token in each line, of which every request needs one; or set "
            f"{TOKENS_VARIABLE}, with commas between them."
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second that one client may send.")
    ] = None,
    burst: Annotated[int, typer.Option(min=1, help="Requests at once before --rate holds.")] = 20,
    origins: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="Site whose pages may ask, as https://example.org."),
    ] = None,
    may_fetch: Annotated[
        bool,
        typer.Option("--allow-urls", help="Fetch pictures by URL, from public addresses alone."),
    ] = False,
) -> None:
    """Serve models over HTTP, with a page to try them on.

    Prints the page's address once all is loaded. Ctrl-C or SIGTERM stops it when everything that it
    accepted is answered; a second one at once. Logs go to stderr, a JSON object a line.
    """
    try:
        from openblip.serve.app import build_app
        from openblip.serve.run import log_as_json
        from openblip.serve.run import serve as serve_app
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'openblip[serve]'") from error
    from openblip.search.index import Index
    from openblip.serve.metrics import Metrics
    from openblip.serve.models import load_models, named_models
    from openblip.serve.settings import ServerSettings
    from openblip.serve.works import SharedIndex

    settings = ServerSettings(
        max_upload_bytes=round(max_upload_mb * 1e6),
        max_pixels=round(max_megapixels * 1e6),
        max_active=max_active,
        answer_timeout_s=answer_timeout,
        drain_timeout_s=drain_timeout,
        tokens=_tokens(token_file),
        requests_per_s=rate,
        burst=burst,
        origins=tuple(origins or ()),
        may_fetch=may_fetch,
        runs=_folders(runs or []),
    )
    metrics = Metrics()
    opened = None if index is None else Index.open(index)
    if store is not None and opened is None:
        raise ValueError(f"--store {store} is of an index: give --index too")
    shared = None if opened is None else SharedIndex(opened, store)
    loaded = load_models(
        named_models(models),
        dtype=dtype,
        batch_size=batch_size,
        batch_wait_s=settings.batch_wait_s,
        metrics=metrics,
        searched_id=None if opened is None else opened.model_id,
    )
    log_as_json()
    serve_app(build_app(loaded, settings, metrics, shared), settings, host, port)


def _tokens(file: Path | None) -> tuple[str, ...]:
    given = os.environ.get(TOKENS_VARIABLE, "").split(",")
    if file is not None:
        given += file.read_text("utf-8").splitlines()
    tokens = tuple(token.strip() for token in given if token.strip())
    if file is not None and not tokens:
        raise ValueError(f"{file} holds no token")
    return tokens


def _folders(runs: list[Path]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for path in runs:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder of a run")
        name = path.resolve().name
        if name in folders:
            raise ValueError(f"two runs are named {name}: {folders[name]} and {path}")
        folders[name] = path
    return folders
