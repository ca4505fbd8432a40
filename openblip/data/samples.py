"""What flows through openblip: an encoded image, its captions, and what is known of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

CaptionSource = Literal["web", "synthetic", "human"]


@dataclass(frozen=True)
class Caption:
    """A caption, who wrote it, and how it was judged.

    match_probability     of the filter's ITM head, in [0, 1]; None: ITM was not asked
    match_probabilities   of each of several filters, where there are several
    similarity            ITC cosine of the filter, in [-1, 1]
    mean_log_probability  per token, nats, under the captioner; synthetic captions alone
    model, filter_model   hashes of the weights that wrote it, and that judged it
    prompt                that the decoder was given
    decoding, seed        how it was decoded
    drop_reason           why it is not for training; None: it is kept
    """

    text: str
    source: CaptionSource = "web"
    match_probability: float | None = None
    similarity: float | None = None
    mean_log_probability: float | None = None
    model: str | None = None
    decoding: Mapping[str, object] | None = None
    seed: int | None = None
    filter_model: str | None = None
    drop_reason: str | None = None
    match_probabilities: tuple[float, ...] | None = None
    prompt: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what is known, without the fields that are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.match_probabilities is not None:
            values["match_probabilities"] = list(self.match_probabilities)
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, value: str | Mapping[str, Any], default_source: CaptionSource) -> "Caption":
        """Read a bare text or an object as `to_json` writes it.

        Raises ValueError for unknown keys, no text, or an unknown source.
        """
        if isinstance(value, str):
            return cls(value, default_source)
        unknown = set(value) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown caption keys: {', '.join(sorted(unknown))}")
        if not isinstance(value.get("text"), str):
            raise ValueError("a caption object needs a string 'text'")
        values = {"source": default_source} | dict(value)
        if isinstance(values.get("match_probabilities"), list):
            values["match_probabilities"] = tuple(values["match_probabilities"])
        if values["source"] not in get_args(CaptionSource):
            raise ValueError(
                f"caption source {values['source']!r}: expected {get_args(CaptionSource)}"
            )
        return cls(**values)


@dataclass(frozen=True)
class Sample:
    """One image, as its file holds it, with any number of captions.

    key              names the image; unique within a data set
    image_extension  of the file, without the dot
    meta             further JSON fields, carried through untouched
    """

    key: str
    image_bytes: bytes
    captions: tuple[Caption, ...] = ()
    meta: Mapping[str, object] = field(default_factory=dict)
    image_extension: str = "jpg"
