"""What the server answers, as JSON."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Problem(_Answer):
    """What went wrong: a code for programs, a sentence for people."""

    code: str
    message: str
    request_id: str


class ErrorAnswer(_Answer):
    """Every error has this shape."""

    error: Problem


class WordAnswer(_Answer):
    """A word of a caption, and how sure the model was of it."""

    text: str
    probability: float


class CaptionAnswer(_Answer):
    """A caption; `flags` may hold `repetition` and `low_confidence`."""

    text: str
    mean_log_probability: float
    is_finished: bool
    flags: list[str]
    words: list[WordAnswer]


def example(value: dict[str, Any]) -> ConfigDict:
    """Return a configuration whose JSON schema shows an example."""
    return ConfigDict(frozen=True, json_schema_extra={"example": value})


class CaptionsAnswer(_Answer):
    """Captions of a picture, the best first."""

    model_config = example(
        {
            "model": "captioner",
            "captions": [
                {
                    "text": "a dog on a beach",
                    "mean_log_probability": -0.61,
                    "is_finished": True,
                    "flags": [],
                    "words": [{"text": "a", "probability": 0.98}],
                }
            ],
        }
    )
    model: str
    captions: list[CaptionAnswer]


class MatchAnswer(_Answer):
    """How well a text fits: probability of the ITM head, and ITC cosine."""

    text: str
    match_probability: float
    similarity: float


class MatchesAnswer(_Answer):
    """Judgements in the order of the texts."""

    model_config = example(
        {
            "model": "filter",
            "texts": [{"text": "a dog", "match_probability": 0.97, "similarity": 0.41}],
        }
    )
    model: str
    texts: list[MatchAnswer]


class AnswerAnswer(_Answer):
    """An answer and its share among those that were judged."""

    text: str
    probability: float
    log_probability: float


class AnswersAnswer(_Answer):
    """Answers to a question, the best first."""

    model_config = example(
        {
            "model": "vqa",
            "question": "what animal is it?",
            "answers": [{"text": "dog", "probability": 0.9, "log_probability": -0.1}],
        }
    )
    model: str
    question: str
    answers: list[AnswerAnswer]


class LabelAnswer(_Answer):
    """A label and its share among the labels; `match_probability` where ITM was asked."""

    label: str
    probability: float
    similarity: float
    match_probability: float | None


class LabelsAnswer(_Answer):
    """All labels, the best first."""

    model_config = example(
        {
            "model": "filter",
            "labels": [
                {
                    "label": "dog",
                    "probability": 0.93,
                    "similarity": 0.41,
                    "match_probability": None,
                }
            ],
        }
    )
    model: str
    labels: list[LabelAnswer]


class EmbedAnswer(_Answer):
    """Unit vectors of a picture and of texts, of one space."""

    model: str
    image_embedding: list[float] | None
    text_embeddings: list[list[float]]


class HeatAnswer(_Answer):
    """A word and how much each patch of the picture speaks for it, rows from the top, in [0, 1]."""

    text: str
    heat: list[list[float]]


class ExplainAnswer(_Answer):
    """What a match rests on; `text` is the text as the model read it."""

    model: str
    text: str
    match_probability: float
    rows: int
    columns: int
    words: list[HeatAnswer]


class HitAnswer(_Answer):
    """A picture that was found; `score` orders them, `picture` is where it can be had."""

    number: int
    key: str
    score: float
    similarity: float
    match_probability: float | None
    metadata: dict[str, Any]
    width: int
    height: int
    picture: str


class SearchAnswer(_Answer):
    """Pictures of the index, the best first; `method` says how they were compared."""

    model: str
    method: str
    num_searched: int
    seconds: dict[str, float]
    hits: list[HitAnswer]


class ModelAnswer(_Answer):
    """A model of this server and what it can do."""

    name: str
    model_id: str
    image_size_px: int
    precision: str
    verbs: list[str]


class IndexAnswer(_Answer):
    """The index that is searched."""

    name: str
    num_images: int


class LimitsAnswer(_Answer):
    """What a request may hold."""

    max_upload_bytes: int
    max_pixels: int
    max_texts: int


class ServerAnswer(_Answer):
    """What this server has."""

    models: list[ModelAnswer]
    index: IndexAnswer | None
    runs: list[str]
    limits: LimitsAnswer


class RunPage(_Answer):
    """A page of a run folder."""

    title: str
    address: str


class Run(_Answer):
    """A run folder and its pages."""

    name: str
    pages: list[RunPage]


class RunsAnswer(_Answer):
    """All run folders."""

    runs: list[Run]
