"""The kinds of work that a server gives to a model, each for any number of requests at once.

Letters: S image side in pixels.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from openblip.answering import Answer, Candidates
from openblip.explain import Explanation, explain
from openblip.generation import Decoding
from openblip.inference import Engine
from openblip.labels import LabelScore
from openblip.results import Judgement, LabelGuess, Word, WrittenCaption
from openblip.search.index import Index, read_state
from openblip.search.query import Query, Results, Searcher
from openblip.search.stores import Store, StoreKind, open_store

_log = logging.getLogger(__name__)


class WordFollower:
    """Passes the words of one caption on, and ends it when nobody listens any more.

    A caption that is begun anew, because another one of its batch failed, tells no word twice.
    """

    def __init__(self, tell: Callable[[Word], None]) -> None:
        self._tell = tell
        self._num_told = self._place = 0
        self._is_left = False

    def leave(self) -> None:
        """Ask for no further word; from any thread."""
        self._is_left = True

    def begin(self) -> None:
        self._place = 0

    def follow(self, word: Word) -> bool:
        self._place += 1
        if self._place > self._num_told and not self._is_left:
            self._num_told += 1
            self._tell(word)
        return not self._is_left


@dataclass(frozen=True)
class CaptionItem:
    """An image (3, S, S), the seed of its captions, and who follows them."""

    image: Tensor
    seed: int
    follower: WordFollower | None = None


@dataclass(frozen=True)
class CaptionWork:
    """Write captions. `is_followed` captions are one per image, by greedy or nucleus."""

    kind: ClassVar[str] = "caption"
    decoding: Decoding
    prompt: str
    captions_per_image: int
    is_followed: bool = False

    def __call__(self, engine: Engine, items: Sequence[CaptionItem]) -> list[list[WrittenCaption]]:
        def on_word(number: int, word: Word) -> bool:
            follower = items[number].follower
            return follower is None or follower.follow(word)

        for item in items:
            if item.follower is not None:
                item.follower.begin()
        return engine.caption(
            torch.stack([item.image for item in items]),
            decoding=self.decoding,
            prompt=self.prompt,
            captions_per_image=self.captions_per_image,
            seeds=[item.seed for item in items],
            on_word=on_word if self.is_followed else None,
        )


@dataclass(frozen=True)
class MatchWork:
    """Judge texts; an item is an image (3, S, S) and its texts."""

    kind: ClassVar[str] = "match"

    def __call__(
        self, engine: Engine, items: Sequence[tuple[Tensor, Sequence[str]]]
    ) -> list[list[Judgement]]:
        return engine.match(torch.stack([image for image, _ in items]), [t for _, t in items])


@dataclass(frozen=True)
class EmbedImageWork:
    """Embed images (3, S, S) -> (E,) each."""

    kind: ClassVar[str] = "embed_image"

    def __call__(self, engine: Engine, items: Sequence[Tensor]) -> list[Tensor]:
        return list(engine.embed_images(torch.stack(list(items))))


@dataclass(frozen=True)
class EmbedTextsWork:
    """Embed the texts of each item -> (number of texts, E)."""

    kind: ClassVar[str] = "embed_texts"

    def __call__(self, engine: Engine, items: Sequence[Sequence[str]]) -> list[Tensor]:
        together = engine.embed_texts([text for texts in items for text in texts])
        return list(torch.split(together, [len(texts) for texts in items]))


@dataclass(frozen=True)
class ClassifyWork:
    """Compare images (3, S, S) with labels."""

    kind: ClassVar[str] = "classify"
    names: tuple[str, ...]
    templates: tuple[str, ...]
    score: LabelScore

    def __call__(self, engine: Engine, items: Sequence[Tensor]) -> list[list[LabelGuess]]:
        labels = engine.labels(self.names, self.templates)
        return engine.classify(torch.stack(list(items)), labels, score=self.score)


@dataclass(frozen=True)
class AskWork:
    """Answer a question about each image; an item is an image (3, S, S) and its question."""

    kind: ClassVar[str] = "ask"
    candidates: tuple[str, ...]
    num_answers: int

    def __call__(
        self, engine: Engine, items: Sequence[tuple[Tensor, str]]
    ) -> list[tuple[Answer, ...]]:
        candidates = Candidates.of(self.candidates, engine.tokenizer) if self.candidates else None
        ranked = engine.ranked_answers(
            torch.stack([image for image, _ in items]),
            [[question] for _, question in items],
            candidates=candidates,
            num_answers=self.num_answers,
        )
        return [answers for [answers] in ranked]


@dataclass(frozen=True)
class ExplainWork:
    """Find what speaks for each word; an item is an image (3, S, S) and a text."""

    kind: ClassVar[str] = "explain"

    def __call__(self, engine: Engine, items: Sequence[tuple[Tensor, str]]) -> list[Explanation]:
        return [explain(engine, image, text) for image, text in items]


class SharedIndex:
    """The index of a server, as it was committed last. A view of it never changes.

    kind  of the store that finds the shortlist; None: all images are compared
    Raises ValueError if there is no such store, or it is behind the index.
    """

    def __init__(self, index: Index, kind: StoreKind | None = None) -> None:
        self.current, self._kind = index, kind
        self._store = None if kind is None else open_store(index, kind)

    def newest(self) -> tuple[Index, Store | None]:
        """Take up what another process committed since; return the view and its store.

        Until a store is made anew, an index that has changed is searched without it.
        """
        if read_state(self.current.folder).generation != self.current.state.generation:
            index = Index.open(self.current.folder)
            self._store = None
            if self._kind is not None:
                try:
                    self._store = open_store(index, self._kind)
                except ValueError as error:
                    _log.warning("all images are compared: %s", error)
            self.current = index
        return self.current, self._store


@dataclass(frozen=True)
class SearchWork:
    """Search an index; an item is a query. Comes back with the view that was searched."""

    kind: ClassVar[str] = "search"
    index: SharedIndex

    def __call__(self, engine: Engine, items: Sequence[Query]) -> list[tuple[Index, Results]]:
        index, store = self.index.newest()
        searcher = Searcher(engine, index, store)
        return [(index, searcher.search(query)) for query in items]
