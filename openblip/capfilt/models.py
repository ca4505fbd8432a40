"""The captioners and filters of a run, and one encoding of an image for all that share it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from torch import Tensor

from openblip.batching import Encoded
from openblip.capfilt.captioner import DECIMALS, Captioner
from openblip.capfilt.filter import Filter
from openblip.data.samples import Caption

Ensemble = Literal["mean", "vote"]
VOTE_THRESHOLD = 0.5


class EncodedBatch:
    """Images, encoded once by each image encoder that a model asks for, and not before.

    images  by their side in pixels, (B, 3, S, S)
    """

    def __init__(self, images: Mapping[int, Tensor]) -> None:
        self._images = images
        self._states: dict[str, Tensor] = {}

    def seen_by(self, model: Captioner | Filter) -> Encoded:
        """Return the images as a model's image encoder gives them."""
        if model.encoder not in self._states:
            images = self._images[model.engine.image_size_px]
            self._states[model.encoder] = model.engine.encode(images).states
        return Encoded(self._states[model.encoder], model.engine.backend)


@dataclass(frozen=True)
class Models:
    """One captioner or several, and one filter or several."""

    captioners: tuple[Captioner, ...]
    filters: tuple[Filter, ...]

    @property
    def _all(self) -> tuple[Captioner | Filter, ...]:
        return (*self.captioners, *self.filters)

    @property
    def sizes_px(self) -> tuple[int, ...]:
        """The image sides that the models need."""
        return tuple(sorted({m.engine.image_size_px for m in self._all}))

    @property
    def captioner_ids(self) -> str:
        """Hashes of the captioners' weights, with a + between them."""
        return "+".join(model.model for model in self.captioners)

    @property
    def filter_ids(self) -> str:
        """Hashes of the filters' weights, with a + between them."""
        return "+".join(model.model for model in self.filters)

    def caption(self, batch: EncodedBatch, keys: Sequence[str]) -> list[list[Caption]]:
        """Write the captions of all captioners, those of the first one first."""
        written: list[list[Caption]] = [[] for _ in keys]
        for captioner in self.captioners:
            for own, new in zip(
                written, captioner.caption(batch.seen_by(captioner), keys), strict=True
            ):
                own += new
        return written

    def judge(
        self,
        batch: EncodedBatch,
        captions: Sequence[Sequence[Caption]],
        *,
        ensemble: Ensemble = "mean",
        min_similarity: float | None = None,
    ) -> list[list[Caption]]:
        """Give captions their match probability and ITC cosine, of all filters together.

        ensemble        `mean` of the filters' match probabilities, or `vote`: the share of filters
                        that give at least 0.5. The cosine is always the mean
        min_similarity  captions with a smaller cosine get no match probability
        Raises FloatingPointError if a filter has diverged.
        """
        texts = [[caption.text for caption in several] for several in captions]
        cosines = self._asked(lambda f: f.similarities(batch.seen_by(f), texts))
        judged = [
            [
                replace(
                    caption, similarity=round(fmean(values), DECIMALS), filter_model=self.filter_ids
                )
                for caption, values in zip(several, rows, strict=True)
            ]
            for several, rows in zip(captions, cosines, strict=True)
        ]
        floor = -1.0 if min_similarity is None else min_similarity
        asked = [[c.text for c in several if _cosine(c) >= floor] for several in judged]
        rest = iter(
            values
            for rows in self._asked(lambda f: f.probabilities(batch.seen_by(f), asked))
            for values in rows
        )
        return [
            [_with(c, next(rest), ensemble) if _cosine(c) >= floor else c for c in several]
            for several in judged
        ]

    def _asked(self, ask: Callable[[Filter], list[list[float]]]) -> list[list[tuple[float, ...]]]:
        """Return what each filter says, side by side, of each text of each image."""
        told = [ask(judge) for judge in self.filters]
        return [list(zip(*several, strict=True)) for several in zip(*told, strict=True)]


def _cosine(caption: Caption) -> float:
    assert caption.similarity is not None
    return caption.similarity


def _with(caption: Caption, values: tuple[float, ...], ensemble: Ensemble) -> Caption:
    votes = [float(value >= VOTE_THRESHOLD) for value in values]
    together = fmean(votes if ensemble == "vote" else values)
    each = tuple(round(value, DECIMALS) for value in values) if len(values) > 1 else None
    return replace(caption, match_probability=round(together, DECIMALS), match_probabilities=each)
