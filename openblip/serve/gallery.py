"""Search over the server's index, and the pictures that it finds."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import Response

from openblip.search import query as searching
from openblip.search.index import Index
from openblip.search.places import UnreadableImageError
from openblip.serve import works
from openblip.serve.app import ImageField, ModelField, Service, ServiceField, UrlField
from openblip.serve.errors import RequestError
from openblip.serve.pictures import checked_picture, thumbnail
from openblip.serve.schemas import HitAnswer, SearchAnswer

router = APIRouter(prefix="/v1")
MOST_HITS, MOST_SHORTLIST, MOST_CONDITIONS = 500, 1024, 16
LARGEST_SIDE_PX = 1024
_SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_CACHED = {"Cache-Control": "private, max-age=3600"}


@router.post("/search", summary="Search the index")
async def search(
    request: Request,
    service: ServiceField,
    text: Annotated[str | None, Form()] = None,
    image: ImageField = None,
    url: UrlField = None,
    model: ModelField = None,
    limit: Annotated[int, Form(ge=1, le=MOST_HITS)] = 20,
    shortlist: Annotated[int, Form(ge=1, le=MOST_SHORTLIST)] = 128,
    rerank: Annotated[bool, Form(description="Let ITM re-rank what a text finds.")] = True,
    where: Annotated[
        list[str] | None, Form(description="Conditions, as width>=300 or caption~dog.")
    ] = None,
) -> SearchAnswer:
    """By a text, by a picture, or by a picture that a text changes."""
    shared = _shared(service)
    served = service.models.pick("search", model)
    text = (text or "").strip() or None
    if text is not None:
        service.checked_texts("text", [text])
    conditions = [condition for condition in where or [] if condition.strip()]
    if len(conditions) > MOST_CONDITIONS:
        raise RequestError(422, "invalid_request", f"where: at most {MOST_CONDITIONS} conditions")
    picture = await service.picture(image, url)
    pixels = None if picture is None else await service.prepared(picture, served)
    if text is None and pixels is None:
        raise RequestError(422, "invalid_request", "give a text, an image, or both")
    query = searching.Query(text, pixels, limit, shortlist, rerank, tuple(conditions))
    index, results = await service.done(request, served, works.SearchWork(shared), query)
    return SearchAnswer(
        model=served.name,
        method=results.method,
        num_searched=results.num_searched,
        seconds=dict(results.seconds),
        hits=[
            HitAnswer(
                number=hit.number,
                key=hit.key,
                score=hit.score,
                similarity=hit.similarity,
                match_probability=hit.match_probability,
                # Where the files of this machine lie is nobody's business.
                metadata={name: v for name, v in hit.metadata.items() if name != "address"},
                width=hit.metadata["width"],
                height=hit.metadata["height"],
                picture=f"/v1/pictures/{index.state.generation}/{hit.number}",
            )
            for hit in results.hits
        ],
    )


@router.get("/pictures/{generation}/{number}", summary="A thumbnail", response_class=Response)
async def picture(
    service: ServiceField,
    generation: int,
    number: int,
    side: Annotated[int, Query(ge=16, le=LARGEST_SIDE_PX)] = 320,
) -> Response:
    index, most = _index(service, generation), service.settings.max_pixels
    name = (generation, number, side)
    data = await service.beside(
        lambda: service.thumbnails.get(name, lambda: thumbnail(_bytes(index, number), side, most))
    )
    return Response(data, media_type="image/jpeg", headers=_CACHED)


@router.get(
    "/pictures/{generation}/{number}/original",
    summary="The picture itself",
    response_class=Response,
)
async def original(service: ServiceField, generation: int, number: int) -> Response:
    index, most = _index(service, generation), service.settings.max_pixels
    data = await service.beside(lambda: _bytes(index, number))
    kind = (await service.beside(lambda: checked_picture(data, most))).kind
    if kind not in _SHOWN:
        raise RequestError(415, "unsupported_format", f"the picture is a {kind}")
    return Response(data, media_type=_SHOWN[kind], headers=_CACHED)


def _shared(service: Service) -> works.SharedIndex:
    if service.index is None:
        raise RequestError(404, "no_index", "this server has no index: start it with --index")
    return service.index


def _index(service: Service, generation: int) -> Index:
    """Return the index that a picture's number is of: another one numbers them otherwise."""
    index = _shared(service).current
    if index.state.generation != generation:
        raise RequestError(404, "index_changed", "the index has changed since; search again")
    return index


def _row(index: Index, number: int) -> dict[str, object]:
    try:
        row = index.row(number)
    except ValueError as error:
        raise RequestError(404, "not_found", str(error)) from error
    if not index.is_live[number]:
        raise RequestError(404, "not_found", f"the picture {number} was deleted")
    return row


def _bytes(index: Index, number: int) -> bytes:
    _row(index, number)
    try:
        return index.image_bytes(number)
    except UnreadableImageError as error:
        raise RequestError(404, "not_found", "the picture is no longer where it was") from error
