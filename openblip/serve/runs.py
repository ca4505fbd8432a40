"""Pages of run folders: reports and training curves, shown as they are and kept apart.

A page of a folder may hold anything. It is served in a sandbox of its own origin, without scripts.
"""

from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter
from fastapi.responses import FileResponse

from openblip.serve.app import ServiceField
from openblip.serve.errors import RequestError
from openblip.serve.schemas import Run, RunPage, RunsAnswer

router = APIRouter(prefix="/v1/runs")
MOST_PAGES = 200
_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)


@router.get("", summary="Run folders and their pages")
async def runs(service: ServiceField) -> RunsAnswer:
    folders = service.settings.runs
    found = await service.beside(lambda: {name: pages_of(path) for name, path in folders.items()})
    return RunsAnswer(
        runs=[
            Run(
                name=name,
                pages=[
                    RunPage(title=page, address=f"/v1/runs/{quote(name)}/{quote(page)}")
                    for page in pages
                ],
            )
            for name, pages in found.items()
        ]
    )


@router.get("/{name}/{page:path}", summary="A page of a run folder", response_class=FileResponse)
async def run_page(service: ServiceField, name: str, page: str) -> FileResponse:
    folder = service.settings.runs.get(name)
    if folder is None or page not in await service.beside(lambda: pages_of(folder)):
        raise RequestError(404, "not_found", "there is no such page")
    return FileResponse(
        folder / page,
        media_type="text/html",
        headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"},
    )


def pages_of(folder: Path) -> list[str]:
    """Return the HTML files in a folder, by their path in it; links out of it are none of them."""
    root = folder.resolve()
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.html")
        if path.is_file() and path.resolve().is_relative_to(root)
    )
    return found[:MOST_PAGES]
