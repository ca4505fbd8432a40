"""What a model is asked for: captions, match probabilities, embeddings, answers, of any number.

Every image is encoded once per call, in batches; all results come back on the CPU.

Letters: S image side in pixels, E embedding width, L tokens, R pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip.captions import clean_caption, clean_question
from openblip.generation import Decoding, generate
from openblip.images import decode_image, eval_transform
from openblip.losses import text_losses
from openblip.models.blip import Blip
from openblip.models.context import Context
from openblip.models.vqa import Vqa
from openblip.tokenizer import TokenBatch, Tokenizer

MAX_TEXT_TOKENS = 35
"""Tokens of a text that is compared, judged or asked, [CLS] and [SEP] included (BLIP's recipes)."""
MAX_ANSWER_TOKENS = 40
"""Tokens of an answer that can be chosen, [DEC] and [SEP] included."""
RANKED_ROWS = 1024
"""Candidate answers that are judged at a time: each has a vocabulary of logits for every token."""
ANSWER_DECODING = Decoding(method="beam", num_beams=3, min_tokens=1, max_tokens=10)
"""As the released code answers."""


DEFAULT_TEMPLATES = (
    "a picture of {}",
    "a picture of a {}",
    "a photo of the {}",
    "there is a {} in the picture",
    "a close-up of a {}",
)
"""Sentences that a label is put into, at `{}`."""


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


@dataclass(frozen=True)
class Labels:
    """Names of classes, and what an image is compared with for each: (number, E), unit norm."""

    names: tuple[str, ...]
    embedding: Tensor


@dataclass(frozen=True)
class LabelGuess:
    """How well a label fits an image: its share among all labels, and ITC cosine."""

    label: str
    probability: float
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
def embed_texts(blip: Blip, tokens: TokenBatch, *, batch_size: int = 256) -> Tensor:
    """Embed tokenised texts -> (number, E), unit norm."""
    embeddings = [torch.zeros(0, blip.config.embedding_width)]
    for start in range(0, tokens.token_ids.shape[0], batch_size):
        token_ids = tokens.token_ids[start : start + batch_size].to(blip.device)
        text_mask = tokens.text_mask[start : start + batch_size].to(blip.device)
        embeddings.append(blip.embed_text(blip.encode_text(token_ids, text_mask)).cpu())
    return torch.cat(embeddings)


def embed_labels(
    blip: Blip,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> Labels:
    """Embed each label as the mean of its sentences' embeddings, normalised again.

    templates   each holds `{}`, where the label goes
    Raises ValueError for no or repeated labels, and for a template without its place.
    Source: CLIP (Radford et al. 2021), section 3.1.4.
    """
    if not names or not templates:
        raise ValueError(f"{len(names)} labels and {len(templates)} templates; give some of both")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"labels that stand more than once: {', '.join(repeated)}")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"templates need one {{}} for the label; these do not: {wrong}")
    texts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = embed_texts(blip, tokenize(tokenizer, texts))
    means = embeddings.view(len(names), len(templates), -1).mean(dim=1)
    return Labels(tuple(names), F.normalize(means, dim=-1))


@torch.no_grad()
def classify(blip: Blip, images: Tensor, labels: Labels) -> list[list[LabelGuess]]:
    """Compare each image of a batch (B, 3, S, S) with all labels; the best guess comes first.

    A probability is the softmax of the cosines over the model's temperature: it is a share among
    these labels, however ill they all fit.
    """
    similarity = embed_images(blip, list(images)) @ labels.embedding.T
    probability = (similarity / blip.temperature.cpu()).softmax(dim=1)
    ranked = similarity.sort(dim=1, descending=True, stable=True).indices
    return [
        [LabelGuess(labels.names[i], float(shares[i]), float(cosines[i])) for i in order.tolist()]
        for order, shares, cosines in zip(ranked, probability, similarity, strict=True)
    ]


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    log_probability  nats, of the whole answer and [SEP] if it came
    """

    text: str
    log_probability: float


@dataclass(frozen=True)
class Candidates:
    """Answers to choose from, tokenised once.

    tokens  of the answers, (A, L)
    """

    texts: tuple[str, ...]
    tokens: TokenBatch

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer) -> "Candidates":
        """Tokenise a list of answers. Raises ValueError if it is empty."""
        if not texts:
            raise ValueError("no candidate answer to choose from")
        return cls(tuple(texts), tokenizer.encode_batch(texts, max_tokens=MAX_ANSWER_TOKENS))


@torch.no_grad()
def encode_questions(
    vqa: Vqa, tokenizer: Tokenizer, images: Tensor, questions: Sequence[Sequence[str]]
) -> Context:
    """Encode any number of questions per image of a batch (B, 3, S, S), each image encoded once.

    Returns what answers look at, one for every question in the order given.
    Raises ValueError if there are not as many lists of questions as images, or no question.
    """
    if len(questions) != images.shape[0]:
        raise ValueError(f"{len(questions)} lists of questions for {images.shape[0]} images")
    owners = [index for index, several in enumerate(questions) for _ in several]
    if not owners:
        raise ValueError("no question to answer")
    texts = [clean_question(text) for several in questions for text in several]
    tokens = tokenizer.encode_batch(texts, max_tokens=MAX_TEXT_TOKENS)
    token_ids, text_mask = tokens.token_ids.to(vqa.device), tokens.text_mask.to(vqa.device)
    context = vqa.project_image(vqa.encode_image(images.to(vqa.device)))
    rows = torch.tensor(owners, device=vqa.device)
    states = vqa.encode_question(token_ids, text_mask, context.select(rows))
    return vqa.project_question(states, text_mask)


@torch.no_grad()
def write_answers(
    vqa: Vqa, tokenizer: Tokenizer, context: Context, decoding: Decoding
) -> list[Answer]:
    """Answer every question of `encode_questions` in the decoder's own words."""
    written = generate(
        vqa,
        context,
        prompt_ids=[],
        tokens=tokenizer.special,
        decoding=decoding,
        seeds=[0] * context.num_images,
    )
    return [
        Answer(tokenizer.decode(one.token_ids), sum(one.log_probabilities)) for [one] in written
    ]


@torch.no_grad()
def rank_answers(
    vqa: Vqa,
    context: Context,
    candidates: Candidates,
    *,
    shortlist: int = 128,
    label_smoothing: float = 0.0,
) -> list[Answer]:
    """Choose the likeliest candidate for every question of `encode_questions`.

    shortlist        candidates whose first token is the likeliest, which are judged as a whole
    label_smoothing  0 compares log-probabilities; the released code judges by its training loss,
                     with 0.1, and so do the `log_probability`s that come back then
    Source: `rank_answer` of the released blip_vqa.py.
    """
    rows = torch.arange(context.num_images, device=vqa.device)
    at_once = max(1, RANKED_ROWS // min(shortlist, len(candidates.texts)))
    answers: list[Answer] = []
    for start in range(0, context.num_images, at_once):
        part = context.select(rows[start : start + at_once])
        answers += _ranked(vqa, part, candidates, shortlist, label_smoothing)
    return answers


def _ranked(
    vqa: Vqa, context: Context, candidates: Candidates, shortlist: int, label_smoothing: float
) -> list[Answer]:
    ids = candidates.tokens.token_ids.to(vqa.device)
    mask = candidates.tokens.text_mask.to(vqa.device)
    start = torch.full((context.num_images, 1), vqa.config.tokens.dec, device=vqa.device)
    first = vqa.decode_step(start, vqa.new_decoder_cache(), context).float().softmax(dim=1)
    places = first[:, ids[:, 1]].topk(min(shortlist, len(candidates.texts)), dim=1).indices
    chosen_ids, chosen_mask = ids[places].flatten(0, 1), mask[places].flatten(0, 1)
    logits = vqa.decode(chosen_ids, chosen_mask, context).float()
    losses = text_losses(logits, chosen_ids, chosen_mask, label_smoothing=label_smoothing)
    best = losses.view(places.shape).min(dim=1)
    chosen = places.gather(1, best.indices[:, None]).squeeze(1)
    return [
        Answer(candidates.texts[place], -loss)
        for place, loss in zip(chosen.tolist(), best.values.tolist(), strict=True)
    ]


def ask(
    vqa: Vqa,
    tokenizer: Tokenizer,
    image: bytes,
    questions: Sequence[str],
    *,
    decoding: Decoding = ANSWER_DECODING,
) -> list[Answer]:
    """Answer questions about an image, a file's bytes. Raises ImageDecodeError."""
    pixels = read_image(image, vqa.config.vision.image_size_px)
    context = encode_questions(vqa, tokenizer, pixels[None], [questions])
    return write_answers(vqa, tokenizer, context, decoding)
