"""Image-text retrieval: ITC similarities, then ITM re-ranks a shortlist (BLIP sec. 5.1).

Letters: I images, T texts, K shortlist.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip.batching import Encoded, ImageLike
from openblip.data.samples import Sample
from openblip.evaluation.metrics import RetrievalRecalls, retrieval_recalls
from openblip.inference import Engine
from openblip.tokenizer import TokenBatch
from openblip.training.log import ProgressLine

NOT_JUDGED = -100.0
"""Score of a pair outside both shortlists, as in the original."""


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of all pairs, higher is better.

    similarity     (I, T) ITC cosine
    image_to_text  (I, T) ITM logit + cosine where the text is in the image's shortlist
    text_to_image  (T, I) the same where the image is in the text's shortlist
    """

    similarity: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


@dataclass(frozen=True)
class RetrievalReport:
    """Recalls by ITC alone, and after ITM has re-ranked the shortlist."""

    itc: RetrievalRecalls
    reranked: RetrievalRecalls
    shortlist: int
    num_images: int
    num_texts: int

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "itc": self.itc.to_json(),
            "reranked": self.reranked.to_json(),
            "shortlist": self.shortlist,
            "num_images": self.num_images,
            "num_texts": self.num_texts,
        }


@torch.no_grad()
def score_retrieval(
    engine: Engine,
    images: Iterable[ImageLike],
    tokens: TokenBatch,
    *,
    shortlist: int,
    is_silent: bool = False,
) -> RetrievalScores:
    """Score every image with every text by ITC, and each one's K best by ITM.

    images     gone through twice, so that no image states need be kept
    is_silent  tell no progress
    Raises ValueError if `images` is an iterator, which is empty the second time.
    Source: `evaluation` of the released train_retrieval.py. A pair of both shortlists is judged
    once, since its score does not depend on the direction.
    """
    similarity = engine.embed_images(images) @ engine.embed_texts(tokens).T
    batches = engine.batches(images)
    return rerank(engine, similarity, batches, tokens, shortlist=shortlist, is_silent=is_silent)


@torch.no_grad()
def rerank(
    engine: Engine,
    similarity: Tensor,
    images: Iterable[Encoded],
    tokens: TokenBatch,
    *,
    shortlist: int,
    is_silent: bool = False,
) -> RetrievalScores:
    """Score by ITM the K best of each image and of each text.

    similarity  (I, T) ITC cosine
    images      all of them in their order, in batches
    is_silent   tell no progress
    Raises ValueError if there are not I of them.
    """
    num_images, num_texts = similarity.shape
    in_image_list = torch.zeros_like(similarity, dtype=torch.bool)
    in_text_list = torch.zeros_like(in_image_list)
    best_texts = similarity.topk(min(shortlist, num_texts), dim=1).indices
    best_images = similarity.topk(min(shortlist, num_images), dim=0).indices
    in_image_list.scatter_(1, best_texts, True)
    in_text_list.scatter_(0, best_images, True)
    scores = torch.full_like(similarity, NOT_JUDGED)
    image = 0
    with ProgressLine("re-ranking", num_images, unit="images", is_silent=is_silent) as progress:
        for batch in images:
            for row in range(len(batch)):
                texts = (in_image_list[image] | in_text_list[image]).nonzero().squeeze(1)
                if len(texts):
                    chosen = TokenBatch(tokens.token_ids[texts], tokens.text_mask[texts], 0)
                    logits = engine.match_tokens(batch[row : row + 1], chosen)
                    scores[image, texts] = logits + similarity[image, texts]
                image += 1
            progress.advance(len(batch))
    if image < num_images:
        raise ValueError(f"{num_images} images came, and {image} the second time: give a list")
    return RetrievalScores(
        similarity,
        scores.masked_fill(~in_image_list, NOT_JUDGED),
        scores.masked_fill(~in_text_list, NOT_JUDGED).T,
    )


def evaluate_retrieval(
    engine: Engine,
    samples: Iterable[Sample],
    *,
    shortlist: int,
    is_silent: bool = False,
) -> RetrievalReport:
    """Measure retrieval among samples, every caption of which is a text of its own.

    is_silent  tell no progress
    Raises ValueError for no samples or one without captions, and ImageDecodeError for a bad image.
    """
    pairs = _Pairs.of(engine, samples)
    scores = score_retrieval(
        engine, pairs.images, pairs.tokens, shortlist=shortlist, is_silent=is_silent
    )
    return RetrievalReport(
        itc=retrieval_recalls(scores.similarity, scores.similarity.T, pairs.owners),
        reranked=retrieval_recalls(scores.image_to_text, scores.text_to_image, pairs.owners),
        shortlist=shortlist,
        num_images=len(pairs.images),
        num_texts=len(pairs.owners),
    )


def evaluate_itc(engine: Engine, samples: Iterable[Sample]) -> RetrievalRecalls:
    """Measure retrieval by ITC alone, as `evaluate_retrieval` does before re-ranking."""
    pairs = _Pairs.of(engine, samples)
    similarity = engine.embed_images(pairs.images) @ engine.embed_texts(pairs.tokens).T
    return retrieval_recalls(similarity, similarity.T, pairs.owners)


@dataclass(frozen=True)
class _Pairs:
    """The samples' image files, all texts, and the image (T,) that each text belongs to."""

    images: list[bytes]
    tokens: TokenBatch
    owners: Tensor

    @classmethod
    def of(cls, engine: Engine, samples: Iterable[Sample]) -> "_Pairs":
        samples = list(samples)
        if not samples:
            raise ValueError("there is no sample to evaluate on")
        texts = [caption.text for sample in samples for caption in sample.captions]
        owners = [index for index, sample in enumerate(samples) for _ in sample.captions]
        images = [sample.image_bytes for sample in samples]
        return cls(images, engine.tokenize(texts), torch.tensor(owners))
