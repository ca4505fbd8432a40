"""What a model is asked for: captions, match probabilities, embeddings, over lists of any length.

Every image is encoded once per call, in batches; all results come back on the CPU.

Letters: S image side in pixels, E embedding width, L tokens, R pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip.captions import clean_caption
from openblip.generation import Decoding, generate
from openblip.images import decode_image, eval_transform
from openblip.models.blip import Blip
from openblip.tokenizer import TokenBatch, Tokenizer

MAX_TEXT_TOKENS = 35
"""Tokens of a text that is compared or judged, [CLS] and [SEP] included (BLIP's retrieval)."""


@dataclass(frozen=True)
class WrittenCaption:
    """A caption as the decoder wrote it.

    token_log_probabilities  nats, of the new tokens and of [SEP] if it came
    is_finished              whether [SEP] came before the longest length
    """

    text: str
    token_log_probabilities: tuple[float, ...]
    mean_log_probability: float
    is_finished: bool


@dataclass(frozen=True)
class Judgement:
    """How well a text fits an image: probability of the ITM head, and ITC cosine."""

    match_probability: float
    similarity: float


def read_image(data: bytes, size_px: int) -> Tensor:
    """Decode and prepare one image -> (3, S, S). Raises ImageDecodeError."""
    return eval_transform(decode_image(data), size_px)


def batched(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stack images (3, S, S) to batches of at most `batch_size`."""
    batch: list[Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> TokenBatch:
    """Clean and encode texts that will be compared with images or judged beside them."""
    return tokenizer.encode_batch(
        [clean_caption(text) for text in texts], max_tokens=MAX_TEXT_TOKENS
    )


@torch.no_grad()
def caption_images(
    blip: Blip,
    tokenizer: Tokenizer,
    images: Tensor,
    *,
    seeds: Sequence[int],
    prompt: str,
    decoding: Decoding,
    captions_per_image: int = 1,
) -> list[list[WrittenCaption]]:
    """Write captions of a batch of images (B, 3, S, S).

    seeds    one per image
    prompt   given to the decoder, and cut off what it writes
    Returns  per image its captions, of beam search the best first
    Raises ValueError as `generation.generate` does.
    """
    context = blip.project_context(blip.encode_image(images.to(blip.device)))
    # [CLS] and [SEP] of the encoded prompt are no part of what is decoded.
    prompt_ids = tokenizer.encode(prompt)[1:-1]
    generated = generate(
        blip,
        context,
        prompt_ids=prompt_ids,
        tokens=tokenizer.special,
        decoding=decoding,
        seeds=seeds,
        captions_per_image=captions_per_image,
    )
    return [
        [
            WrittenCaption(
                tokenizer.decode(one.token_ids),
                one.log_probabilities,
                one.mean_log_probability,
                one.is_finished,
            )
            for one in several
        ]
        for several in generated
    ]


@torch.no_grad()
def judge_texts(
    blip: Blip, tokenizer: Tokenizer, images: Tensor, texts: Sequence[Sequence[str]]
) -> list[list[Judgement]]:
    """Judge any number of texts per image of a batch (B, 3, S, S), each image encoded once."""
    if len(texts) != images.shape[0]:
        raise ValueError(f"{len(texts)} lists of texts for {images.shape[0]} images")
    owners = [index for index, several in enumerate(texts) for _ in several]
    if not owners:
        return [[] for _ in texts]
    rows = torch.tensor(owners, device=blip.device)
    tokens = tokenize(tokenizer, [text for several in texts for text in several])
    token_ids, text_mask = tokens.token_ids.to(blip.device), tokens.text_mask.to(blip.device)
    image_states = blip.encode_image(images.to(blip.device))
    context = blip.project_context(image_states).select(rows)
    logits = blip.match_logits(blip.encode_pair(token_ids, text_mask, context))
    image_embedding = blip.embed_image(image_states)[rows]
    text_embedding = blip.embed_text(blip.encode_text(token_ids, text_mask))
    judgements = map(
        Judgement,
        logits.float().softmax(dim=1)[:, 1].tolist(),
        (image_embedding * text_embedding).sum(dim=1).tolist(),
    )
    return [[next(judgements) for _ in several] for several in texts]


@torch.no_grad()
def embed_images(blip: Blip, images: Iterable[Tensor], *, batch_size: int = 32) -> Tensor:
    """Embed images (3, S, S) -> (number, E), unit norm."""
    embeddings = [torch.zeros(0, blip.config.embedding_width)]
    for batch in batched(images, batch_size):
        embeddings.append(blip.embed_image(blip.encode_image(batch.to(blip.device))).cpu())
    return torch.cat(embeddings)


@torch.no_grad()
def refine_images(blip: Blip, tokenizer: Tokenizer, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Move the embeddings of a batch of images by a text each -> image_embedding (B, E), unit norm.

    images  (B, 3, S, S)
    texts   what is true of the image that is sought, as "the same, but the circle is blue"
    Raises ValueError if the numbers differ, and if the model has no reconstruction head.
    """
    if len(texts) != images.shape[0]:
        raise ValueError(f"{len(texts)} texts for {images.shape[0]} images")
    tokens = tokenize(tokenizer, texts)
    device = blip.device
    return blip.refine_image(
        images.to(device), tokens.token_ids.to(device), tokens.text_mask.to(device)
    ).cpu()


@torch.no_grad()
def embed_texts(blip: Blip, tokens: TokenBatch, *, batch_size: int = 256) -> Tensor:
    """Embed tokenised texts -> (number, E), unit norm."""
    embeddings = [torch.zeros(0, blip.config.embedding_width)]
    for start in range(0, tokens.token_ids.shape[0], batch_size):
        token_ids = tokens.token_ids[start : start + batch_size].to(blip.device)
        text_mask = tokens.text_mask[start : start + batch_size].to(blip.device)
        embeddings.append(blip.embed_text(blip.encode_text(token_ids, text_mask)).cpu())
    return torch.cat(embeddings)
