"""Search: an ITC shortlist of an index, re-ranked by ITM (BLIP sec. 5.1).

Letters: E embedding width.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from openblip.backend import TorchBackend
from openblip.batching import Encoded, ImageLike
from openblip.data.prefetch import map_beside
from openblip.images import ImageDecodeError
from openblip.inference import Engine
from openblip.search.index import Index
from openblip.search.stores import Store
from openblip.search.where import matching


@dataclass(frozen=True)
class Query:
    """What is sought: by a text, by an image, or by an image that a text changes.

    limit        images that are wanted
    shortlist    images that ITM judges, of a text alone
    is_reranked  let ITM judge them; without it, order by ITC alone
    where        conditions on what is known of the images (`where.matching`), all of them
    Raises ValueError without text and image, and for numbers below 1.
    """

    text: str | None = None
    image: ImageLike | None = None
    limit: int = 20
    shortlist: int = 128
    is_reranked: bool = True
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.text is None and self.image is None:
            raise ValueError("nothing to search for: give a text, an image, or both")
        if self.text is not None and not self.text.strip():
            raise ValueError("the text to search for is empty")
        if self.limit < 1 or self.shortlist < 1:
            raise ValueError(f"limit {self.limit}, shortlist {self.shortlist}: expected 1 or more")


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    score              what orders the images: ITM logit + cosine where ITM judged, as in BLIP's
                       retrieval, else the cosine
    similarity         ITC cosine
    match_probability  of ITM, None where it did not judge
    """

    number: int
    key: str
    score: float
    similarity: float
    match_probability: float | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What a search found, the best first.

    method      how images were compared, for people
    unreadable  keys of images of the shortlist that ITM could not judge, because they are no
                longer where they were indexed; they stand behind the others
    seconds     of embedding the query, finding the shortlist, and re-ranking it
    """

    hits: tuple[Hit, ...]
    method: str
    num_searched: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()


class Searcher:
    """Searches an index with the model that it was made with.

    model_id  hash of the engine's weights; None leaves that to the caller
    store     finds the shortlist; None: the index itself, exactly
    Raises ValueError for another model, or a store of another index.
    """

    def __init__(
        self,
        engine: Engine,
        index: Index,
        store: Store | None = None,
        *,
        model_id: str | None = None,
    ) -> None:
        if model_id is not None and model_id != index.model_id:
            raise ValueError(
                f"{index.folder} was made with the model {index.state.model} ({index.model_id}); "
                f"a model {model_id} embeds elsewhere"
            )
        self.engine, self.index, self._store = engine, index, store

    def search(self, query: Query) -> Results:
        """Find images. Raises ValueError for bad conditions, and ImageDecodeError."""
        start = time.perf_counter()
        embedding, method = self.embed(query)
        embedded = time.perf_counter()
        allowed = matching(self.index, query.where) if query.where else None
        is_judged = query.is_reranked and query.text is not None and query.image is None
        wanted = max(query.limit, query.shortlist) if is_judged else query.limit
        numbers, cosines = self._nearest(embedding, wanted, allowed)
        found = time.perf_counter()
        logits: dict[int, tuple[float, float]] = {}
        unreadable: list[str] = []
        if is_judged:
            assert query.text is not None
            shortlist = numbers[: query.shortlist]
            logits = self._judge(query.text, shortlist)
            unreadable = [self.index.key(n) for n in shortlist if n not in logits]
            method = f"{method}, the nearest {len(shortlist)} re-ranked by ITM"
        judged = time.perf_counter()
        # Judged images stand before the others, whatever their logits.
        order = sorted(
            zip(numbers, cosines, strict=True),
            key=lambda one: (
                one[0] not in logits,
                -(logits[one[0]][0] + one[1] if one[0] in logits else one[1]),
            ),
        )
        hits = [self._hit(number, cosine, logits) for number, cosine in order[: query.limit]]
        num_searched = len(self.index) if allowed is None else int(
            (allowed & self.index.is_live).sum()
        )  # fmt: skip
        seconds = {
            "embed": embedded - start,
            "shortlist": found - embedded,
            "rerank": judged - found,
        }
        return Results(tuple(hits), method, num_searched, seconds, tuple(unreadable))

    def embed(self, query: Query) -> tuple[Tensor, str]:
        """Return what images are compared with, (E,) of unit norm, and what it is made of."""
        if query.image is None:
            assert query.text is not None
            return self.engine.embed_texts([query.text])[0], "text by ITC"
        if query.text is None:
            return self.engine.embed_images([query.image])[0], "picture by ITC"
        backend = self.engine.backend
        if isinstance(backend, TorchBackend) and backend.config.reconstruction is not None:
            return self.engine.refine([query.image], [query.text])[0], "picture refined by text"
        both = self.engine.embed_images([query.image]) + self.engine.embed_texts([query.text])
        return F.normalize(both, dim=1)[0], "mean of picture and text by ITC"

    def _nearest(
        self, embedding: Tensor, num: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[list[int], list[float]]:
        if self._store is None:
            return self.index.top(embedding, num, allowed)
        return self._store.top(self.index, embedding, num, allowed)

    def _judge(self, text: str, numbers: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Return logit and probability of the match with each image that can be read."""
        tokens = self.engine.tokenize([text])
        judged: dict[int, tuple[float, float]] = {}

        def judge(own: Sequence[int], encoded: Encoded) -> None:
            logits = self.engine.backend.match_logits(
                tokens.token_ids.expand(len(own), -1),
                tokens.text_mask.expand(len(own), -1),
                range(len(own)),
                encoded.context,
            ).cpu()
            both = zip(logits[:, 1].tolist(), logits.softmax(dim=1)[:, 1].tolist(), strict=True)
            judged.update(zip(own, both, strict=True))

        size = self.engine.batcher.batch_size
        stored = {n: s for n in numbers if (s := self.index.states(n)) is not None}
        with_states = list(stored)
        device, width = self.engine.backend.device, self.engine.precision
        for start in range(0, len(with_states), size):
            own = with_states[start : start + size]
            states = torch.stack([stored[number] for number in own]).to(device)
            judge(own, Encoded(states.to(_DTYPES.get(width, torch.float32)), self.engine.backend))
        rest = [number for number in numbers if number not in stored]
        places = self.index.places_of(rest)
        batch: list[tuple[int, Tensor]] = []

        def prepare(read: tuple[int, bytes | None]) -> tuple[int, Tensor | None]:
            place, data = read
            try:
                return rest[place], None if data is None else self.engine.batcher.prepare(data)
            except ImageDecodeError:
                # The file was changed since: it is told as unreadable.
                return rest[place], None

        def judge_batch() -> None:
            if batch:
                pixels = torch.stack([image for _, image in batch])
                judge([number for number, _ in batch], self.engine.encode(pixels))
                batch.clear()

        for number, image in map_beside(prepare, self.index.places.read_all(places)):
            if image is not None:
                batch.append((number, image))
            if len(batch) == size:
                judge_batch()
        judge_batch()
        return judged

    def _hit(self, number: int, cosine: float, logits: Mapping[int, tuple[float, float]]) -> Hit:
        logit, probability = logits.get(number, (0.0, None))
        return Hit(
            number, self.index.key(number), cosine + logit, cosine, probability,
            self.index.metadata(number),
        )  # fmt: skip


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
