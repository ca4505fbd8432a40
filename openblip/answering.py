"""Questions about images: encoded once, answered in own words or by the likeliest candidate."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openblip.captions import clean_question
from openblip.generation import Decoding, generate
from openblip.losses import text_losses
from openblip.models.context import Context
from openblip.models.vqa import Vqa
from openblip.tokenizer import MAX_TEXT_TOKENS, TokenBatch, Tokenizer

MAX_ANSWER_TOKENS = 40
"""Tokens of an answer that can be chosen, [DEC] and [SEP] included."""
RANKED_ROWS = 1024
"""Candidate answers that are judged at a time: each has a vocabulary of logits for every token."""
ANSWER_DECODING = Decoding(method="beam", num_beams=3, min_tokens=1, max_tokens=10)
"""As the released code answers."""


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    log_probability  nats, of the whole answer and [SEP] if it came
    probability      share among the answers that were judged: the candidates of the shortlist, or
                     the beams
    """

    text: str
    log_probability: float
    probability: float


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


def answer_batches(
    vqa: Vqa,
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    questions: Sequence[Sequence[str]],
    *,
    candidates: Candidates | None,
    shortlist: int,
    decoding: Decoding,
) -> list[list[tuple[Answer, ...]]]:
    """Answer any number of questions per image, the images in batches (B, 3, S, S).

    Returns per image, per question what `rank_candidates` gives, or `write_ranked` where there are
    no candidates.
    Raises ValueError if there are not as many lists of questions as images.
    """
    answers: list[list[tuple[Answer, ...]]] = []
    for pixels in batches:
        own = questions[len(answers) : len(answers) + len(pixels)]
        if len(own) < len(pixels):
            raise ValueError(f"{len(questions)} lists of questions for more images")
        if not any(own):
            answers += [[] for _ in own]
            continue
        context = encode_questions(vqa, tokenizer, pixels, own)
        given = iter(
            write_ranked(vqa, tokenizer, context, decoding)
            if candidates is None
            else rank_candidates(vqa, context, candidates, shortlist=shortlist)
        )
        answers += [[next(given) for _ in several] for several in own]
    if len(answers) != len(questions):
        raise ValueError(f"{len(questions)} lists of questions for {len(answers)} images")
    return answers


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
    most = min(MAX_TEXT_TOKENS, vqa.config.question.max_positions)
    tokens = tokenizer.encode_batch(texts, max_tokens=most)
    token_ids, text_mask = tokens.token_ids.to(vqa.device), tokens.text_mask.to(vqa.device)
    pixels = images.to(vqa.device, vqa.vision.class_token.dtype)
    context = vqa.project_image(vqa.encode_image(pixels))
    rows = torch.tensor(owners, device=vqa.device)
    states = vqa.encode_question(token_ids, text_mask, context.select(rows))
    return vqa.project_question(states, text_mask)


def write_answers(
    vqa: Vqa, tokenizer: Tokenizer, context: Context, decoding: Decoding
) -> list[Answer]:
    """Answer every question of `encode_questions` in the decoder's own words."""
    return [best for best, *_ in write_ranked(vqa, tokenizer, context, decoding)]


@torch.no_grad()
def write_ranked(
    vqa: Vqa, tokenizer: Tokenizer, context: Context, decoding: Decoding
) -> list[tuple[Answer, ...]]:
    """Write all that the decoder has for every question of `encode_questions`, the best first.

    Of beam search these are the beams, in its own order, which divides log-probabilities by the
    answers' lengths. Two that read alike are one answer, with the probabilities of both.
    """
    written = generate(
        vqa,
        context,
        prompt_ids=[],
        tokens=tokenizer.special,
        decoding=decoding,
        seeds=[0] * context.num_images,
        captions_per_image=decoding.num_beams if decoding.method == "beam" else 1,
    )
    answers: list[tuple[Answer, ...]] = []
    for several in written:
        logs = [sum(one.log_probabilities) for one in several]
        shares = torch.tensor(logs, dtype=torch.float64).softmax(dim=0).tolist()
        found: dict[str, Answer] = {}
        for one, log, share in zip(several, logs, shares, strict=True):
            text = tokenizer.decode(one.token_ids)
            first = found.get(text)
            found[text] = (
                Answer(text, log, share)
                if first is None
                else replace(first, probability=first.probability + share)
            )
        answers.append(tuple(found.values()))
    return answers


def rank_answers(
    vqa: Vqa,
    context: Context,
    candidates: Candidates,
    *,
    shortlist: int = 128,
    label_smoothing: float = 0.0,
) -> list[Answer]:
    """Choose the likeliest candidate for every question; the arguments are `rank_candidates`'."""
    ranked = rank_candidates(
        vqa, context, candidates, shortlist=shortlist, label_smoothing=label_smoothing
    )
    return [best for best, *_ in ranked]


@torch.no_grad()
def rank_candidates(
    vqa: Vqa,
    context: Context,
    candidates: Candidates,
    *,
    shortlist: int = 128,
    label_smoothing: float = 0.0,
) -> list[tuple[Answer, ...]]:
    """Order the likeliest candidates for every question of `encode_questions`, the best first.

    shortlist        candidates whose first token is the likeliest, which are judged as a whole
    label_smoothing  0 compares log-probabilities; the released code judges by its training loss,
                     with 0.1, and so do the `log_probability`s that come back then
    Returns          the shortlist of every question
    Source: `rank_answer` of the released blip_vqa.py.
    """
    rows = torch.arange(context.num_images, device=vqa.device)
    at_once = max(1, RANKED_ROWS // min(shortlist, len(candidates.texts)))
    answers: list[tuple[Answer, ...]] = []
    for start in range(0, context.num_images, at_once):
        part = context.select(rows[start : start + at_once])
        answers += _ranked(vqa, part, candidates, shortlist, label_smoothing)
    return answers


def _ranked(
    vqa: Vqa, context: Context, candidates: Candidates, shortlist: int, label_smoothing: float
) -> list[tuple[Answer, ...]]:
    ids = candidates.tokens.token_ids.to(vqa.device)
    mask = candidates.tokens.text_mask.to(vqa.device)
    start = torch.full((context.num_images, 1), vqa.config.tokens.dec, device=vqa.device)
    first = vqa.decode_step(start, vqa.new_decoder_cache(), context).float().softmax(dim=1)
    places = first[:, ids[:, 1]].topk(min(shortlist, len(candidates.texts)), dim=1).indices
    chosen_mask = mask[places].flatten(0, 1)
    # One long answer of the list makes no other shortlist longer.
    length = int(chosen_mask.sum(dim=1).max())
    chosen_ids, chosen_mask = ids[places].flatten(0, 1)[:, :length], chosen_mask[:, :length]
    logits = vqa.decode(chosen_ids, chosen_mask, context).float()
    losses = text_losses(logits, chosen_ids, chosen_mask, label_smoothing=label_smoothing)
    logs = -losses.view(places.shape)
    shares = logs.softmax(dim=1)
    order = logs.sort(dim=1, descending=True, stable=True).indices
    ranked = [values.gather(1, order).tolist() for values in (places, logs, shares)]
    return [
        tuple(
            Answer(candidates.texts[place], log, share)
            for place, log, share in zip(*one, strict=True)
        )
        for one in zip(*ranked, strict=True)
    ]
