"""The engine: what library, command line, CapFilt, search and server ask of a trained model.

Letters: I images, S image side in pixels, N patches, D width, E embedding width, T texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip.answering import ANSWER_DECODING, Answer, Candidates, answer_batches
from openblip.backend import Backend, TorchBackend
from openblip.batching import (
    Batcher,
    Encoded,
    ImageLike,
    Images,
    fitting_batch,
    join_texts,
    text_parts,
)
from openblip.captions import DEFAULT_PROMPT, clean_caption
from openblip.generation import Decoding, generate
from openblip.kernels import Precision, best_precision, prepare
from openblip.labels import (
    DEFAULT_TEMPLATES,
    LabelScore,
    LabelScores,
    label_sentences,
)
from openblip.models.blip import Blip
from openblip.models.vqa import Vqa
from openblip.results import Judgement, LabelGuess, Labels, WrittenCaption
from openblip.tokenizer import MAX_TEXT_TOKENS, TokenBatch, Tokenizer
from openblip.words import OnWord, WordStream

Dtype = Precision | Literal["auto"]
T = TypeVar("T")


class Engine:
    """A trained model, ready to be asked about any number of images.

    model       a `Blip`, a `Vqa` (which is only asked), or another backend that runs a BLIP, in its
                own precision
    dtype       `auto` is what is fastest on the model's device among those that lose no accuracy
                worth speaking of; int8 is taken on request alone (docs/performance.md)
    batch_size  images that are worked on together; by default what the free memory holds. It
                changes no result beyond rounding, and is halved where memory does not suffice
    prepack     lay out the weights for the processor, in a copy
    Raises ValueError for a precision that the device does not have.
    """

    def __init__(
        self,
        model: Blip | Vqa | Backend,
        tokenizer: Tokenizer,
        *,
        dtype: Dtype = "auto",
        batch_size: int | None = None,
        prepack: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self._backend: Backend | None = None
        self._vqa: Vqa | None = None
        self.precision: Precision = best_precision(model.device) if dtype == "auto" else dtype
        match model:
            case Blip():
                self._backend = TorchBackend(model, self.precision, prepack=prepack)
            case Vqa():
                self._vqa = prepare(model, self.precision, prepack=prepack)
            case _:
                self._backend, self.precision = model, model.precision
        self.config = model.config
        vision, text = model.config.vision, model.config.text
        self.batcher = Batcher(
            vision.image_size_px, batch_size or fitting_batch(vision, text, model.device)
        )

    @classmethod
    def plain(cls, model: Blip | Vqa, tokenizer: Tokenizer) -> "Engine":
        """Return an engine that runs the model itself, in float32: it follows its training."""
        return cls(model, tokenizer, dtype="float32", prepack=False)

    @property
    def backend(self) -> Backend:
        """What runs the model. Raises ValueError for a model that is only asked."""
        if self._backend is None:
            raise ValueError("this model answers questions; captions and matches are another's")
        return self._backend

    @property
    def image_size_px(self) -> int:
        """S, the side that images are resized to."""
        return self.config.vision.image_size_px

    def encode(self, images: Images) -> Encoded:
        """Encode images once, for all that will be asked of them."""
        if isinstance(images, Encoded):
            return images
        parts = [encoded.states for encoded in self._run(images, lambda encoded: [encoded])]
        config = self.config.vision
        empty = torch.zeros(0, 1 + config.num_patches, config.width, device=self.backend.device)
        return Encoded(torch.cat(parts) if parts else empty, self.backend)

    def caption(
        self,
        images: Images,
        *,
        decoding: Decoding | None = None,
        prompt: str = DEFAULT_PROMPT,
        captions_per_image: int = 1,
        seeds: Sequence[int] | None = None,
        on_word: OnWord | None = None,
    ) -> list[list[WrittenCaption]]:
        """Write captions.

        decoding  by default beam search with 3 beams, 5 to 20 tokens
        prompt    given to the decoder, and cut off what it writes
        seeds     one per image, for nucleus; by default 0, 1, 2 ...
        on_word   for greedy and nucleus with one caption per image: called with the image's number
                  and a word as soon as the word is certain; returning False ends the caption there
        Returns   per image its captions, of beam search the best first
        Raises ValueError as `generation.generate` does, and ImageDecodeError.
        """
        # [CLS] and [SEP] of the encoded prompt are no part of what is decoded.
        prompt_ids = self.tokenizer.encode(prompt)[1:-1]
        rest = None if seeds is None else list(seeds)
        stream = None if on_word is None else WordStream(self.tokenizer, on_word)
        done = 0

        def write(encoded: Encoded) -> list[list[WrittenCaption]]:
            nonlocal done
            start, stop = done, done + len(encoded)
            own = list(range(start, stop)) if rest is None else rest[start:stop]
            generated = generate(
                self.backend,
                encoded.context,
                prompt_ids=prompt_ids,
                tokens=self.tokenizer.special,
                decoding=decoding or Decoding(),
                seeds=own,
                captions_per_image=captions_per_image,
                on_token=None if stream is None else stream.follower(start),
            )
            if stream is not None:
                generated = stream.finish(start, generated)
            done = stop
            return [
                [WrittenCaption.of(one, self.tokenizer) for one in several] for several in generated
            ]

        captions = self._run(images, write)
        if rest is not None and len(rest) != len(captions):
            raise ValueError(f"{len(rest)} seeds for {len(captions)} images")
        return captions

    def match(self, images: Images, texts: Sequence[Sequence[str]]) -> list[list[Judgement]]:
        """Judge any number of texts per image, by ITM and by ITC.

        texts   those of the first image, of the second, ...
        Raises ValueError if there are not as many lists as images, and ImageDecodeError.
        """
        return self._match(images, texts, has_similarity=True)

    def match_probabilities(self, images: Images, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        """Judge by ITM alone, which takes less: per image the probabilities of its texts."""
        judged = self._match(images, texts, has_similarity=False)
        return [torch.tensor([one.match_probability for one in several]) for several in judged]

    def match_matrix(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Judge every text beside every image by ITM -> (I, T) probabilities."""
        tokens = self.tokenize(texts)

        def judge(encoded: Encoded) -> list[Tensor]:
            return list(self._judge_tokens(encoded, [tokens] * len(encoded)).view(len(encoded), -1))

        rows = self._run(images, judge)
        return torch.stack(rows) if rows else torch.zeros(0, len(texts))

    def match_tokens(self, encoded: Encoded, tokens: TokenBatch) -> Tensor:
        """Return the ITM logits that tokenised texts (T, L) match one image -> (T,)."""
        return self._logits(encoded, [tokens])[:, 1]

    def embed_images(self, images: Images) -> Tensor:
        """Embed images -> (I, E), unit norm. Raises ImageDecodeError."""
        if isinstance(images, Encoded):
            return self.backend.embed_states(images.states).cpu()
        rows: list[Tensor] = []
        for pixels in self.batcher.prepared(images):
            rows += self.batcher.halving(pixels, self._embedded)
        return torch.stack(rows) if rows else torch.zeros(0, self._embedding_width)

    def embed_texts(self, texts: Sequence[str] | TokenBatch) -> Tensor:
        """Embed texts -> (T, E), unit norm."""
        tokens = texts if isinstance(texts, TokenBatch) else self.tokenize(texts)
        embeddings = [torch.zeros(0, self._embedding_width)]
        for part in text_parts(tokens):
            embeddings.append(
                self.backend.embed_texts(tokens.token_ids[part], tokens.text_mask[part]).cpu()
            )
        return torch.cat(embeddings)

    def refine(self, images: Iterable[ImageLike] | Tensor, texts: Sequence[str]) -> Tensor:
        """Move the embedding of each image by a text -> (I, E), unit norm.

        texts   what is true of the image that is sought, as "the same, but the circle is blue"
        Raises ValueError if the numbers differ, and if the model has no reconstruction head.
        """
        if not isinstance(self.backend, TorchBackend):
            raise ValueError("images are refined by a model in PyTorch alone")
        tokens = self.tokenize(texts)
        rows = [torch.zeros(0, self._embedding_width)]
        done = 0
        for pixels in self.batcher.prepared(images):
            part = slice(done, done + len(pixels))
            if part.stop > len(texts):
                raise ValueError(f"{len(texts)} texts for {part.stop} images or more")
            rows.append(
                self.backend.refine(pixels, tokens.token_ids[part], tokens.text_mask[part]).cpu()
            )
            done = part.stop
        if done != len(texts):
            raise ValueError(f"{len(texts)} texts for {done} images")
        return torch.cat(rows)

    def labels(self, names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Labels:
        """Embed each label as the mean of its sentences' embeddings, normalised again.

        templates   each holds `{}`, where the label goes
        Raises ValueError for no or repeated labels, and for a template without its place.
        Source: CLIP (Radford et al. 2021), section 3.1.4.
        """
        sentences = label_sentences(names, templates)
        means = self.embed_texts(sentences).view(len(names), len(templates), -1).mean(dim=1)
        return Labels(tuple(names), F.normalize(means, dim=-1), sentences)

    def classify(
        self,
        images: Images,
        labels: Labels,
        *,
        score: LabelScore = "itc",
        temperature: float = 1.0,
    ) -> list[list[LabelGuess]]:
        """Compare each image with all labels; the best guess comes first.

        score        itc compares embeddings; itm judges the image beside every sentence of every
                     label, which takes far longer; both adds them up (`labels.LabelScores`)
        temperature  above 1 makes the shares more even, below 1 less; the order stays
        A probability is a share among these labels, however ill they all fit.
        Raises ValueError for a temperature of 0 or below.
        """
        if not temperature > 0:
            raise ValueError(f"the temperature is {temperature}; it must be above 0")
        return self.label_scores(images, labels, score).guesses(labels, temperature)

    def label_scores(self, images: Images, labels: Labels, score: LabelScore) -> LabelScores:
        """Score every label beside every image, as `classify` does."""
        own = self.backend.temperature
        if score == "itc":
            return LabelScores.of(score, self.embed_images(images) @ labels.embedding.T, own)
        tokens = self.tokenize(labels.sentences)

        def judge(encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
            logits = self._logits(encoded, [tokens] * len(encoded))
            odds = (logits[:, 1] - logits[:, 0]).view(len(encoded), len(labels.names), -1)
            embedded = self.backend.embed_states(encoded.states).cpu()
            return list(zip(embedded @ labels.embedding.T, odds.mean(dim=2), strict=True))

        rows = self._run(images, judge)
        empty = torch.zeros(0, len(labels.names))
        similarity, odds = map(torch.stack, zip(*rows, strict=True)) if rows else (empty, empty)
        return LabelScores.of(score, similarity, own, odds)

    def ask(
        self,
        images: Iterable[ImageLike] | Tensor,
        questions: Sequence[Sequence[str]],
        *,
        candidates: Candidates | None = None,
        shortlist: int = 128,
        decoding: Decoding = ANSWER_DECODING,
    ) -> list[list[Answer]]:
        """Answer any number of questions per image.

        questions   those of the first image, of the second, ...
        candidates  answers to choose from; without them the model writes its own
        shortlist   candidates that are judged as a whole
        Raises ValueError for a model that does not answer questions, and if there are not as many
        lists as images; ImageDecodeError.
        """
        ranked = self.ranked_answers(
            images, questions, candidates=candidates, num_answers=1, shortlist=shortlist,
            decoding=decoding,
        )  # fmt: skip
        return [[several[0] for several in own] for own in ranked]

    def ranked_answers(
        self,
        images: Iterable[ImageLike] | Tensor,
        questions: Sequence[Sequence[str]],
        *,
        candidates: Candidates | None = None,
        num_answers: int = 5,
        shortlist: int = 128,
        decoding: Decoding = ANSWER_DECODING,
    ) -> list[list[tuple[Answer, ...]]]:
        """Answer as `ask` does, with more than one answer per question.

        num_answers  at most; there are no more than candidates, or beams where the model writes
        Returns      per image, per question its answers, the best first
        Raises ValueError and ImageDecodeError as `ask` does.
        """
        if self._vqa is None:
            raise ValueError("this model answers no questions: `openblip finetune vqa` makes one")
        if num_answers < 1:
            raise ValueError(f"num_answers {num_answers} must be at least 1")
        ranked = answer_batches(
            self._vqa, self.tokenizer, self.batcher.prepared(images), questions,
            candidates=candidates, shortlist=shortlist, decoding=decoding,
        )  # fmt: skip
        return [[several[:num_answers] for several in own] for own in ranked]

    def batches(self, images: Iterable[ImageLike] | Tensor) -> Iterator[Encoded]:
        """Encode images batch by batch; they are read in threads, a batch ahead of the model."""
        for pixels in self.batcher.prepared(images):
            yield from self.batcher.halving(pixels, lambda part: [self._encode(part)])

    @property
    def _embedding_width(self) -> int:
        return self.backend.config.embedding_width

    def _embedded(self, pixels: Tensor) -> list[Tensor]:
        return list(self.backend.embed_images(pixels).cpu())

    def _encode(self, pixels: Tensor) -> Encoded:
        return Encoded(self.backend.encode_images(pixels), self.backend)

    def _match(
        self, images: Images, texts: Sequence[Sequence[str]], *, has_similarity: bool
    ) -> list[list[Judgement]]:
        if isinstance(images, Encoded | Tensor | Sequence) and len(images) != len(texts):
            raise ValueError(f"{len(texts)} lists of texts for {len(images)} images")
        done = 0

        def judge(encoded: Encoded) -> list[list[Judgement]]:
            nonlocal done
            own = texts[done : done + len(encoded)]
            if len(own) < len(encoded):
                raise ValueError(f"{len(texts)} lists of texts for more images")
            tokens = [self.tokenize(several) for several in own]
            probabilities = self._judge_tokens(encoded, tokens)
            similarities = torch.full_like(probabilities, torch.nan)
            if has_similarity and len(probabilities):
                counts = torch.tensor([len(several) for several in own])
                image = self.backend.embed_states(encoded.states).cpu().repeat_interleave(counts, 0)
                text = self.embed_texts([text for several in own for text in several])
                similarities = (image * text).sum(dim=1)
            done += len(encoded)
            both = map(Judgement, probabilities.tolist(), similarities.tolist())
            return [[next(both) for _ in several] for several in own]

        judged = self._run(images, judge)
        if len(judged) != len(texts):
            raise ValueError(f"{len(texts)} lists of texts for {len(judged)} images")
        return judged

    def _judge_tokens(self, encoded: Encoded, tokens: Sequence[TokenBatch]) -> Tensor:
        return self._logits(encoded, tokens).softmax(dim=1)[:, 1]

    def _logits(self, encoded: Encoded, tokens: Sequence[TokenBatch]) -> Tensor:
        """Return ITM logits (all texts, 2) of the tokenised texts of each image."""
        owners = [index for index, one in enumerate(tokens) for _ in range(len(one.token_ids))]
        together = join_texts(tokens)
        logits = [torch.zeros(0, 2)]
        for part in text_parts(together):
            logits.append(
                self.backend.match_logits(
                    together.token_ids[part], together.text_mask[part], owners[part],
                    encoded.context,
                ).cpu()
            )  # fmt: skip
        return torch.cat(logits)

    def tokenize(self, texts: Sequence[str]) -> TokenBatch:
        """Clean and encode texts to compare with images, cut to what the model takes."""
        most = min(MAX_TEXT_TOKENS, self.backend.config.text.max_positions)
        return tokenize(self.tokenizer, texts, most)

    def _run(self, images: Images, work: Callable[[Encoded], list[T]]) -> list[T]:
        return self.batcher.run(images, self._encode, work)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], most: int = MAX_TEXT_TOKENS) -> TokenBatch:
    """Clean and encode texts that will be compared with images or judged beside them."""
    return tokenizer.encode_batch([*map(clean_caption, texts)], max_tokens=most)
