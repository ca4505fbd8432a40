"""What a server does with a picture."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request
from fastapi.responses import StreamingResponse

from openblip.captions import DEFAULT_PROMPT
from openblip.generation import Decoding
from openblip.labels import DEFAULT_TEMPLATES, LabelScore
from openblip.results import Word, WrittenCaption
from openblip.serve import works
from openblip.serve.app import ImageField, ModelField, Service, ServiceField, UrlField
from openblip.serve.errors import INTERNAL, RequestError, error_body, request_id_of
from openblip.serve.models import ServedModel
from openblip.serve.schemas import (
    AnswerAnswer,
    AnswersAnswer,
    CaptionAnswer,
    CaptionsAnswer,
    EmbedAnswer,
    ExplainAnswer,
    HeatAnswer,
    IndexAnswer,
    LabelAnswer,
    LabelsAnswer,
    LimitsAnswer,
    MatchAnswer,
    MatchesAnswer,
    ModelAnswer,
    ServerAnswer,
    WordAnswer,
)

router = APIRouter(prefix="/v1")
_log = logging.getLogger(__name__)
MOST_TOKENS, MOST_CAPTIONS, MOST_BEAMS = 100, 16, 16


@router.get("/models", summary="What this server has")
async def models(service: ServiceField) -> ServerAnswer:
    settings = service.settings
    index = None if service.index is None else service.index.current
    return ServerAnswer(
        models=[
            ModelAnswer(
                name=one.name,
                model_id=one.model_id,
                image_size_px=one.engine.image_size_px,
                precision=one.engine.precision,
                verbs=list(one.verbs),
            )
            for one in service.models
        ],
        index=None
        if index is None
        else IndexAnswer(name=index.folder.resolve().name, num_images=len(index)),
        runs=list(settings.runs),
        limits=LimitsAnswer(
            max_upload_bytes=settings.max_upload_bytes,
            max_pixels=settings.max_pixels,
            max_texts=settings.max_texts,
        ),
    )


@router.post(
    "/caption",
    summary="Write captions",
    response_model=CaptionsAnswer,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def caption(
    request: Request,
    service: ServiceField,
    image: ImageField = None,
    url: UrlField = None,
    model: ModelField = None,
    prompt: Annotated[str, Form(max_length=200)] = DEFAULT_PROMPT,
    method: Annotated[Literal["beam", "greedy", "nucleus"] | None, Form()] = None,
    num_beams: Annotated[int, Form(ge=1, le=MOST_BEAMS)] = 3,
    top_p: Annotated[float, Form(gt=0, le=1)] = 0.9,
    num_captions: Annotated[int, Form(ge=1, le=MOST_CAPTIONS)] = 1,
    min_tokens: Annotated[int, Form(ge=0, le=MOST_TOKENS)] = 5,
    max_tokens: Annotated[int, Form(ge=1, le=MOST_TOKENS)] = 20,
    seed: Annotated[int, Form(ge=0, lt=2**31)] = 0,
    stream: Annotated[bool, Form(description="As server-sent events, word by word.")] = False,
) -> Any:
    """By beam search, or greedily where captions are streamed, unless a method is named."""
    served = service.models.pick("caption", model)
    chosen = method or ("greedy" if stream else "beam")
    if stream and (chosen == "beam" or num_captions > 1):
        raise RequestError(
            422, "invalid_request", "stream: one caption by greedy or nucleus can be streamed; "
            "those of beam search are certain at the end alone"
        )  # fmt: skip
    try:
        decoding = Decoding(
            method=chosen, num_beams=num_beams, top_p=top_p, min_tokens=min_tokens,
            max_tokens=max_tokens,
        )  # fmt: skip
    except ValueError as error:
        raise RequestError(422, "invalid_request", str(error)) from error
    picture = await service.needed_picture(image, url)
    item = works.CaptionItem(await service.prepared(picture, served), seed)
    work = works.CaptionWork(decoding, prompt, num_captions, is_followed=stream)
    if stream:
        events = _events(request, service, served, work, item)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    captions = await service.done(request, served, work, item)
    return _captions(served.name, captions)


async def _events(
    request: Request,
    service: Service,
    served: ServedModel,
    work: works.CaptionWork,
    item: works.CaptionItem,
) -> AsyncIterator[bytes]:
    """Yield the events of a caption that is being written; ends it when nobody listens."""
    loop = asyncio.get_running_loop()
    words: asyncio.Queue[Word | None] = asyncio.Queue()

    def tell(word: Word) -> None:
        loop.call_soon_threadsafe(words.put_nowait, word)

    follower = works.WordFollower(tell)
    job = asyncio.create_task(
        service.done(request, served, work, replace(item, follower=follower), is_watched=False)
    )
    job.add_done_callback(lambda _: words.put_nowait(None))
    try:
        while (word := await words.get()) is not None:
            yield _event("word", asdict(word))
        try:
            yield _event("done", _captions(served.name, job.result()).model_dump())
        except RequestError as error:
            yield _event("error", error_body(error.code, str(error.detail), request_id_of(request)))
        except Exception:
            # The answer has begun, so its status cannot say it.
            _log.exception("request %s failed", request_id_of(request))
            yield _event("error", error_body("internal", INTERNAL, request_id_of(request)))
    finally:
        follower.leave()
        job.cancel()


@router.post("/match", summary="Judge how well texts fit")
async def match(
    request: Request,
    service: ServiceField,
    texts: Annotated[list[str], Form()],
    image: ImageField = None,
    url: UrlField = None,
    model: ModelField = None,
) -> MatchesAnswer:
    served = service.models.pick("match", model)
    texts = service.checked_texts("texts", texts)
    picture = await service.needed_picture(image, url)
    item = (await service.prepared(picture, served), texts)
    judged = await service.done(request, served, works.MatchWork(), item)
    return MatchesAnswer(
        model=served.name,
        texts=[
            MatchAnswer(text=text, **asdict(one)) for text, one in zip(texts, judged, strict=True)
        ],
    )


@router.post("/ask", summary="Answer a question")
async def ask(
    request: Request,
    service: ServiceField,
    question: Annotated[str, Form(min_length=1)],
    image: ImageField = None,
    url: UrlField = None,
    model: ModelField = None,
    answers: Annotated[list[str] | None, Form(description="To choose from.")] = None,
    num_answers: Annotated[int, Form(ge=1, le=100)] = 5,
) -> AnswersAnswer:
    """In the model's own words, or by the likeliest of the answers that are given."""
    served = service.models.pick("ask", model)
    service.checked_texts("question", [question])
    candidates = service.checked_texts("answers", answers) if answers else []
    picture = await service.needed_picture(image, url)
    item = (await service.prepared(picture, served), question)
    work = works.AskWork(tuple(candidates), num_answers)
    ranked = await service.done(request, served, work, item)
    return AnswersAnswer(
        model=served.name,
        question=question,
        answers=[AnswerAnswer(**asdict(one)) for one in ranked],
    )


@router.post("/classify", summary="Say which label fits best")
async def classify(
    request: Request,
    service: ServiceField,
    labels: Annotated[list[str], Form()],
    image: ImageField = None,
    url: UrlField = None,
    model: ModelField = None,
    templates: Annotated[
        list[str] | None, Form(description="Sentences with {} for the label.")
    ] = None,
    score: Annotated[LabelScore, Form()] = "itc",
) -> LabelsAnswer:
    """By ITC, by ITM, which takes far longer, or by both; probabilities are shares."""
    served = service.models.pick("classify" if score == "itc" else "match", model)
    names = [label.strip() for label in service.checked_texts("labels", labels, fewest=2)]
    given = service.checked_texts("templates", templates) if templates else DEFAULT_TEMPLATES
    if len(names) * len(given) > 8 * service.settings.max_texts:
        raise RequestError(413, "too_large", "labels times templates are too many sentences")
    picture = await service.needed_picture(image, url)
    pixels = await service.prepared(picture, served)
    work = works.ClassifyWork(tuple(names), tuple(given), score)
    guesses = await service.done(request, served, work, pixels)
    return LabelsAnswer(
        model=served.name, labels=[LabelAnswer(**asdict(guess)) for guess in guesses]
    )


@router.post("/embed", summary="Embed a picture, texts, or both")
async def embed(
    request: Request,
    service: ServiceField,
    image: ImageField = None,
    url: UrlField = None,
    texts: Annotated[list[str] | None, Form()] = None,
    model: ModelField = None,
) -> EmbedAnswer:
    served = service.models.pick("embed", model)
    texts = service.checked_texts("texts", texts) if texts else []
    picture = await service.picture(image, url)
    if picture is None and not texts:
        raise RequestError(422, "invalid_request", "give an image, texts, or both")
    embedding, embedded = None, []
    if picture is not None:
        pixels = await service.prepared(picture, served)
        embedding = await service.done(request, served, works.EmbedImageWork(), pixels)
    if texts:
        embedded = await service.done(request, served, works.EmbedTextsWork(), texts)
    return EmbedAnswer(
        model=served.name,
        image_embedding=None if embedding is None else embedding.tolist(),
        text_embeddings=[one.tolist() for one in embedded],
    )


@router.post("/explain", summary="Show what a match rests on")
async def explain(
    request: Request,
    service: ServiceField,
    text: Annotated[str, Form(min_length=1)],
    image: ImageField = None,
    url: UrlField = None,
    model: ModelField = None,
) -> ExplainAnswer:
    """For every word, how much each patch of the picture speaks for it (Grad-CAM of ITM)."""
    served = service.models.pick("explain", model)
    service.checked_texts("text", [text])
    picture = await service.needed_picture(image, url)
    item = (await service.prepared(picture, served), text)
    found = await service.done(request, served, works.ExplainWork(), item)
    rows, columns = found.words[0].heat.shape
    return ExplainAnswer(
        model=served.name,
        text=found.text,
        match_probability=found.match_probability,
        rows=rows,
        columns=columns,
        words=[HeatAnswer(text=one.text, heat=one.heat.tolist()) for one in found.words],
    )


def _captions(model: str, captions: list[WrittenCaption]) -> CaptionsAnswer:
    return CaptionsAnswer(
        model=model,
        captions=[
            CaptionAnswer(
                text=one.text,
                mean_log_probability=one.mean_log_probability,
                is_finished=one.is_finished,
                flags=list(one.flags),
                words=[WordAnswer(**asdict(word)) for word in one.words],
            )
            for one in captions
        ],
    )


def _event(name: str, value: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
