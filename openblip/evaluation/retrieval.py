"""Image-text retrieval: ITC similarities, then ITM re-ranks a shortlist (BLIP sec. 5.1).

Letters: I images, T texts, K shortlist, S image side in pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip.data.samples import Sample
from openblip.evaluation.metrics import RetrievalRecalls, retrieval_recalls
from openblip.inference import batched, embed_images, embed_texts, read_image, tokenize
from openblip.models.blip import Blip
from openblip.tokenizer import TokenBatch, Tokenizer
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
    blip: Blip,
    images: Iterable[Tensor],
    tokens: TokenBatch,
    *,
    shortlist: int,
    batch_size: int = 8,
    is_silent: bool = False,
) -> RetrievalScores:
    """Score every image with every text by ITC, and each one's K best by ITM.

    images      (3, S, S) each; gone through twice, so that no image states need be kept
    batch_size  images encoded together; all pairs of one image are judged together
    is_silent   tell no progress
    Raises ValueError if `images` is an iterator, which is empty the second time.
    Source: `evaluation` of the released train_retrieval.py. A pair of both shortlists is judged
    once, since its score does not depend on the direction.
    """
    similarity = embed_images(blip, images) @ embed_texts(blip, tokens).T
    states = (blip.encode_image(batch.to(blip.device)) for batch in batched(images, batch_size))
    return rerank(blip, similarity, states, tokens, shortlist=shortlist, is_silent=is_silent)


@torch.no_grad()
def rerank(
    blip: Blip,
    similarity: Tensor,
    image_states: Iterable[Tensor],
    tokens: TokenBatch,
    *,
    shortlist: int,
    is_silent: bool = False,
) -> RetrievalScores:
    """Score by ITM the K best of each image and of each text.

    similarity    (I, T) ITC cosine
    image_states  of all images in their order, in batches (B, positions, width)
    is_silent     tell no progress
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
        for batch in image_states:
            context = blip.project_context(batch)
            for row in range(batch.shape[0]):
                texts = (in_image_list[image] | in_text_list[image]).nonzero().squeeze(1)
                if len(texts):
                    text_mask = tokens.text_mask[texts]
                    length = int(text_mask.sum(dim=1).max())
                    pair_states = blip.encode_pair(
                        tokens.token_ids[texts, :length].to(blip.device),
                        text_mask[:, :length].to(blip.device),
                        context.select(torch.tensor([row], device=blip.device)),
                    )
                    logits = blip.match_logits(pair_states)[:, 1].float().cpu()
                    scores[image, texts] = logits + similarity[image, texts]
                image += 1
            progress.advance(batch.shape[0])
    if image < num_images:
        raise ValueError(f"{num_images} images came, and {image} the second time: give a list")
    return RetrievalScores(
        similarity,
        scores.masked_fill(~in_image_list, NOT_JUDGED),
        scores.masked_fill(~in_text_list, NOT_JUDGED).T,
    )


def evaluate_retrieval(
    blip: Blip,
    tokenizer: Tokenizer,
    samples: Iterable[Sample],
    *,
    shortlist: int,
    is_silent: bool = False,
) -> RetrievalReport:
    """Measure retrieval among samples, every caption of which is a text of its own.

    is_silent  tell no progress
    Raises ValueError for no samples or one without captions, and ImageDecodeError for a bad image.
    """
    pairs = _Pairs.of(blip, tokenizer, samples)
    scores = score_retrieval(
        blip, pairs.images, pairs.tokens, shortlist=shortlist, is_silent=is_silent
    )
    return RetrievalReport(
        itc=retrieval_recalls(scores.similarity, scores.similarity.T, pairs.owners),
        reranked=retrieval_recalls(scores.image_to_text, scores.text_to_image, pairs.owners),
        shortlist=shortlist,
        num_images=len(pairs.images.samples),
        num_texts=len(pairs.owners),
    )


def evaluate_itc(blip: Blip, tokenizer: Tokenizer, samples: Iterable[Sample]) -> RetrievalRecalls:
    """Measure retrieval by ITC alone, as `evaluate_retrieval` does before re-ranking."""
    pairs = _Pairs.of(blip, tokenizer, samples)
    similarity = embed_images(blip, pairs.images) @ embed_texts(blip, pairs.tokens).T
    return retrieval_recalls(similarity, similarity.T, pairs.owners)


@dataclass(frozen=True)
class _Images:
    """The samples' images, decoded anew in each pass."""

    samples: list[Sample]
    size_px: int

    def __iter__(self) -> Iterator[Tensor]:
        return (read_image(sample.image_bytes, self.size_px) for sample in self.samples)


@dataclass(frozen=True)
class _Pairs:
    """The samples' images, all texts, and the image (T,) that each text belongs to."""

    images: _Images
    tokens: TokenBatch
    owners: Tensor

    @classmethod
    def of(cls, blip: Blip, tokenizer: Tokenizer, samples: Iterable[Sample]) -> "_Pairs":
        samples = list(samples)
        if not samples:
            raise ValueError("there is no sample to evaluate on")
        texts = [caption.text for sample in samples for caption in sample.captions]
        owners = [index for index, sample in enumerate(samples) for _ in sample.captions]
        images = _Images(samples, blip.config.vision.image_size_px)
        return cls(images, tokenize(tokenizer, texts), torch.tensor(owners))
