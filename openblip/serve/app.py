"""The server: routes, and how a request becomes work of a model.

A picture is checked and decoded in a thread, its work is queued for the model's own thread, and
the event loop waits for neither. Who leaves takes the work back.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from torch import Tensor

from openblip import __version__
from openblip.serve.errors import RequestError, install
from openblip.serve.fetch import fetch
from openblip.serve.guard import Guard, cors_options
from openblip.serve.metrics import Metrics
from openblip.serve.models import Models, ServedModel
from openblip.serve.pictures import Picture, Thumbnails, checked_picture
from openblip.serve.schemas import ErrorAnswer
from openblip.serve.settings import ServerSettings
from openblip.serve.worker import StoppedError, Work
from openblip.serve.works import SharedIndex

PAGE = Path(__file__).with_name("page")
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript",
               ".svg": "image/svg+xml"}  # fmt: skip
_DECODERS, _FETCHERS = 4, 8
T = TypeVar("T")

ImageField = Annotated[UploadFile | None, File(description="Picture: JPEG, PNG, WebP, GIF or BMP.")]
UrlField = Annotated[
    str | None,
    Form(max_length=2000, description="Where the picture lies, if the server fetches pictures."),
]
ModelField = Annotated[
    str | None, Form(max_length=200, description="Name of a model; else the first that can do it.")
]


@dataclass
class Service:
    """What all routes share."""

    models: Models
    settings: ServerSettings
    metrics: Metrics
    threads: ThreadPoolExecutor
    fetchers: ThreadPoolExecutor
    index: SharedIndex | None = None
    thumbnails: Thumbnails = field(default_factory=Thumbnails)

    async def picture(self, image: UploadFile | None, url: str | None) -> Picture | None:
        """Return the picture of a request, checked and not yet decoded."""
        url = url or None
        if image is not None and url is not None:
            raise RequestError(422, "invalid_request", "give a picture or its URL, not both")
        if image is not None:
            data = await image.read()
        elif url is None:
            return None
        elif not self.settings.may_fetch:
            raise RequestError(422, "no_urls", "this server fetches no pictures; send the picture")
        else:
            # In threads of their own: a slow site keeps no other picture waiting.
            data = await asyncio.get_running_loop().run_in_executor(
                self.fetchers, fetch, url, self.settings.max_upload_bytes
            )
        return await self.beside(lambda: checked_picture(data, self.settings.max_pixels))

    async def needed_picture(self, image: UploadFile | None, url: str | None) -> Picture:
        """Return the picture of a request that needs one."""
        picture = await self.picture(image, url)
        if picture is None:
            raise RequestError(422, "no_image", "the field `image` holds no picture")
        return picture

    async def prepared(self, picture: Picture, model: ServedModel) -> Tensor:
        """Decode a picture as a model takes it -> (3, S, S)."""
        size_px, most = model.engine.image_size_px, self.settings.max_pixels
        return await self.beside(lambda: picture.prepared(size_px, most))

    async def beside(self, work: Callable[[], T]) -> T:
        """Do something in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def done(
        self,
        request: Request,
        model: ServedModel,
        work: Work,
        item: Any,
        *,
        is_watched: bool = True,
    ) -> Any:
        """Let a model do a job and return its result.

        is_watched  take the job back when the client leaves; what streams an answer sees to that
                    itself
        Raises RequestError if it takes too long, and if the request is at fault.
        """
        try:
            future = model.worker.submit(work, item)
        except StoppedError as error:
            raise RequestError(503, "stopping", str(error), {"Retry-After": "5"}) from error
        job = asyncio.wrap_future(future)
        gone = asyncio.create_task(_until_gone(request)) if is_watched else job
        try:
            await asyncio.wait(
                {job, gone},
                timeout=self.settings.answer_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            if gone is not job:
                gone.cancel()
            if not job.done():
                job.cancel()
        if job.cancelled():
            if gone is not job and gone.done():
                raise RequestError(499, "client_left", "the client left")
            seconds = self.settings.answer_timeout_s
            raise RequestError(504, "timeout", f"there was no answer in {seconds:g} s")
        try:
            return job.result()
        except ValueError as error:
            raise RequestError(422, "invalid_request", str(error)) from error

    def checked_texts(self, name: str, texts: list[str], fewest: int = 1) -> list[str]:
        """Return the texts of a field. Raises RequestError for too many, few, long or empty."""
        most, longest = self.settings.max_texts, self.settings.max_characters
        if not fewest <= len(texts) <= most:
            raise RequestError(
                422, "invalid_request", f"{name}: {len(texts)}, expected {fewest} to {most}"
            )
        if any(len(text) > longest for text in texts):
            raise RequestError(
                413, "too_large", f"{name}: a text is longer than {longest} characters"
            )
        if any(not text.strip() for text in texts):
            raise RequestError(422, "invalid_request", f"{name}: a text is empty")
        return texts


def service_of(request: Request) -> Service:
    """Return what the app of a request shares."""
    service: Service = request.app.state.service
    return service


ServiceField = Annotated[Service, Depends(service_of)]


def build_app(
    models: Models,
    settings: ServerSettings,
    metrics: Metrics,
    index: SharedIndex | None = None,
) -> FastAPI:
    """Return the app of a server; `guarded` puts its outermost layer around it."""
    # The routes' files import this one.
    from openblip.serve.gallery import router as gallery_router
    from openblip.serve.routes import router as work_router
    from openblip.serve.runs import router as runs_router

    threads = ThreadPoolExecutor(_DECODERS, "pictures")
    fetchers = ThreadPoolExecutor(_FETCHERS, "fetches")
    service = Service(models, settings, metrics, threads, fetchers, index)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(models.stop)
        service.threads.shutdown(cancel_futures=True)
        service.fetchers.shutdown(cancel_futures=True)

    app = FastAPI(
        title="openblip",
        version=__version__,
        summary="Captions, matches, answers, labels, embeddings and search of pictures.",
        docs_url=None,  # their scripts come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses={
            status: {"model": ErrorAnswer}
            for status in (400, 401, 404, 405, 408, 413, 415, 422, 429, 503, 504)
        },
    )
    app.state.service = service
    install(app)
    app.include_router(work_router)
    app.include_router(gallery_router)
    app.include_router(runs_router)
    app.get("/", include_in_schema=False)(_page)
    app.get("/page/{file}", include_in_schema=False)(_page_file)
    app.get("/healthz", summary="Whether the server runs")(_healthz)
    app.get("/readyz", summary="Whether the server takes work")(_readyz)
    app.get("/metrics", summary="Figures for Prometheus", response_class=Response)(_metrics)
    if settings.origins:
        app.add_middleware(CORSMiddleware, **cors_options(settings.origins))
    return app


def guarded(app: FastAPI) -> Guard:
    """Put the outermost layer around an app."""
    service: Service = app.state.service
    guard = Guard(app, service.settings, service.metrics)
    app.state.guard = guard
    return guard


async def _until_gone(request: Request) -> None:
    """Wait until the client has closed its connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _page() -> FileResponse:
    return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})


async def _page_file(file: str) -> FileResponse:
    path = PAGE / file
    kind = _PAGE_TYPES.get(path.suffix)
    if path.parent != PAGE or kind is None or not path.is_file():
        raise RequestError(404, "not_found", "the page has no such file")
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})


async def _healthz() -> dict[str, str]:
    return {"status": "ok"}


async def _readyz(request: Request) -> JSONResponse:
    guard: Guard | None = getattr(request.app.state, "guard", None)
    if guard is not None and guard.is_draining:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": "ready"})


async def _metrics(service: ServiceField) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
