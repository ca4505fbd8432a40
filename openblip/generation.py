"""Decoding: greedy, beam and nucleus over cached steps, for the image-grounded decoder.

Letters: B images, K rows per image (beams or captions), R = B * K rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from openblip.generation_batch import Decoder, Generated, RunningBatch
from openblip.models.context import Context
from openblip.models.text import SpecialTokens

NEGLIGIBLE = -1e9
"""Starting score of all beams but the first, which would otherwise be its copies."""

Sampler = Callable[[Tensor, Sequence[torch.Generator]], Tensor]
OnToken = Callable[[int, Generated], bool]
"""Takes the number of an image and its caption so far; returning False ends the caption."""


@dataclass(frozen=True)
class Decoding:
    """How captions are decoded.

    min_tokens, max_tokens  of the caption; in scoring `openblip` they count generated tokens, in
                            `transformers-4.15` [DEC] and the prompt too
    top_p, top_k            of nucleus; top_k 0 is off
    repetition_penalty      divides positive and multiplies negative logits of earlier tokens
    length_penalty          exponent of the length by which a beam's log-probability is divided
    scoring                 `transformers-4.15` repeats the released code's ids: its beam search
                            penalises log-probabilities, and its lengths include the prompt
    Raises ValueError for values out of range.
    """

    method: Literal["greedy", "beam", "nucleus"] = "beam"
    num_beams: int = 3
    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    min_tokens: int = 5
    max_tokens: int = 20
    length_penalty: float = 1.0
    scoring: Literal["openblip", "transformers-4.15"] = "openblip"

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams {self.num_beams} must be at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be at least 0")
        if self.temperature <= 0.0 or self.repetition_penalty <= 0.0:
            raise ValueError("temperature and repetition_penalty must be above 0")
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise ValueError(
                f"min_tokens {self.min_tokens} and max_tokens {self.max_tokens}: "
                "expected 0 <= min_tokens <= max_tokens, and at least one token"
            )

    def to_json(self) -> Mapping[str, object]:
        return asdict(self)


@torch.no_grad()
def generate(
    decoder: Decoder,
    context: Context,
    *,
    prompt_ids: Sequence[int],
    tokens: SpecialTokens,
    decoding: Decoding,
    seeds: Sequence[int],
    captions_per_image: int = 1,
    sample: Sampler | None = None,
    on_token: OnToken | None = None,
) -> list[list[Generated]]:
    """Decode captions of B images.

    context     of the images, B
    prompt_ids  tokens after [DEC] that are given
    seeds       one per image: what is drawn for it depends on nothing else in the batch
    sample      draws one token per row from probabilities (R, V); for tests
    on_token    called after every token of a caption that has not ended, [SEP] included; what it
                ends is not finished, and changes no other caption
    Returns     per image `captions_per_image` captions, of beam search the best ones
    Raises ValueError if more captions are asked for than the method has, and for `on_token` with
    beam search, whose texts are certain at the end alone, or with several captions per image.
    """
    if len(seeds) != context.num_images:
        raise ValueError(f"{len(seeds)} seeds for {context.num_images} images")
    most = {"greedy": 1, "beam": decoding.num_beams}.get(decoding.method)
    if captions_per_image < 1 or (most is not None and captions_per_image > most):
        raise ValueError(
            f"captions_per_image {captions_per_image}: {decoding.method} gives 1 to {most or 'any'}"
        )
    if on_token is not None and (decoding.method == "beam" or captions_per_image != 1):
        raise ValueError(
            f"captions can be followed where greedy or nucleus writes one per image, not with "
            f"{decoding.method} and {captions_per_image}"
        )
    prefix = [tokens.dec, *prompt_ids]
    if decoding.method == "beam":
        return _beam(decoder, context, prefix, tokens, decoding, captions_per_image)
    draw = _argmax if decoding.method == "greedy" else sample or _multinomial
    return _step_by_step(
        decoder, context, prefix, tokens, decoding, seeds, captions_per_image, draw, on_token
    )


def _step_by_step(
    decoder: Decoder,
    context: Context,
    prefix: list[int],
    tokens: SpecialTokens,
    decoding: Decoding,
    seeds: Sequence[int],
    captions_per_image: int,
    draw: Sampler,
    on_token: OnToken | None,
) -> list[list[Generated]]:
    num_rows = context.num_images * captions_per_image
    generators = [
        torch.Generator(context.device).manual_seed(_mixed(seed, index))
        for seed in seeds
        for index in range(captions_per_image)
    ]
    batch = RunningBatch.start(decoder, context, prefix, captions_per_image)
    is_done = torch.zeros(num_rows, dtype=torch.bool, device=context.device)
    written: dict[int, list[Generated]] = {}
    min_length, max_length = _lengths(decoding, len(prefix))
    while batch.images:
        logits = batch.next_logits()
        scores = _penalise(logits, batch.ids, decoding.repetition_penalty)
        if batch.ids.shape[1] < min_length:
            scores[:, tokens.sep] = -torch.inf
        if decoding.method == "nucleus":
            scores = _nucleus(scores / decoding.temperature, decoding.top_k, decoding.top_p)
        own = [generators[row] for row in batch.first_rows()]
        chosen = draw(scores.softmax(dim=1), own).masked_fill(is_done, tokens.pad)
        batch.append(chosen, logits.log_softmax(dim=1))
        is_done |= chosen == tokens.sep
        if on_token is not None:
            for place, image in enumerate(batch.images):
                if image not in written and not on_token(image, *batch.captions(place, tokens)):
                    is_done[place] = True
        is_over = batch.ids.shape[1] >= max_length
        ended = is_done.view(-1, captions_per_image).all(dim=1) | is_over
        for place in ended.nonzero().flatten().tolist():
            if batch.images[place] not in written:
                written[batch.images[place]] = batch.captions(place, tokens)
        rows = batch.leave(ended)
        is_done = is_done[rows]
    return [written[image] for image in range(context.num_images)]


def _beam(
    decoder: Decoder,
    context: Context,
    prefix: list[int],
    tokens: SpecialTokens,
    decoding: Decoding,
    captions_per_image: int,
) -> list[list[Generated]]:
    """Search with K beams per image, as transformers 4.15 does but for what `scoring` changes."""
    num_beams, device = decoding.num_beams, context.device
    is_legacy = decoding.scoring == "transformers-4.15"
    min_length, max_length = _lengths(decoding, len(prefix))
    not_counted = 0 if is_legacy else len(prefix)
    batch = RunningBatch.start(decoder, context, prefix, num_beams)
    totals = torch.full((context.num_images, num_beams), NEGLIGIBLE, device=device)
    totals[:, 0] = 0.0
    finished: list[list[tuple[float, Generated]]] = [[] for _ in range(context.num_images)]
    is_done = [False] * context.num_images

    def keep(image: int, total: float, caption: Generated, length: int) -> None:
        score = total / max(1, length - not_counted) ** decoding.length_penalty
        finished[image] = sorted(
            [*finished[image], (score, caption)], key=lambda item: item[0], reverse=True
        )[:num_beams]

    while batch.images and batch.ids.shape[1] < max_length:
        length = batch.ids.shape[1]
        # The released code leaves out the token that is being added; in ours even [SEP] counts.
        counted = length if is_legacy else length + 1
        logits = batch.next_logits()
        own = logits.log_softmax(dim=1)
        if is_legacy:
            scores = _penalise(own, batch.ids, decoding.repetition_penalty)
        elif decoding.repetition_penalty == 1.0:
            scores = own.clone()
        else:
            scores = _penalise(logits, batch.ids, decoding.repetition_penalty).log_softmax(dim=1)
        if length < min_length:
            scores[:, tokens.sep] = -torch.inf
        vocabulary = scores.shape[1]
        sums = (scores.view(len(batch.images), num_beams, -1) + totals[:, :, None]).flatten(1)
        best, places = sums.topk(2 * num_beams, dim=1)
        rows, next_ids, next_totals = [], [], []
        for place, (several, origins) in enumerate(
            zip(best.tolist(), places.tolist(), strict=True)
        ):
            image, first = batch.images[place], place * num_beams
            candidates = [
                (total, first + origin // vocabulary, origin % vocabulary)
                for total, origin in zip(several, origins, strict=True)
            ]
            if not is_done[image]:
                for total, row, token in candidates[:num_beams]:
                    if token == tokens.sep:
                        gains = (*batch.gains[row].tolist(), float(own[row, token]))
                        caption = Generated(tuple(batch.new_ids(row)), gains, True)
                        keep(image, total, caption, counted)
            for total, row, token in [c for c in candidates if c[2] != tokens.sep][:num_beams]:
                rows.append(row)
                next_ids.append(token)
                next_totals.append(total)
            if len(finished[image]) == num_beams and not is_done[image]:
                divisor = max(1, counted - not_counted) ** decoding.length_penalty
                is_done[image] = finished[image][-1][0] >= candidates[0][0] / divisor
        order = torch.tensor(rows, device=device)
        batch.reorder(order)
        batch.append(torch.tensor(next_ids, device=device), own[order])
        totals = torch.tensor(next_totals, device=device).view(-1, num_beams)
        left = batch.leave(torch.tensor([is_done[image] for image in batch.images], device=device))
        totals = totals.flatten()[left].view(-1, num_beams)
    for place, image in enumerate(batch.images):
        if is_done[image]:
            continue
        for beam, total in enumerate(totals[place].tolist()):
            row = place * num_beams + beam
            caption = Generated(tuple(batch.new_ids(row)), tuple(batch.gains[row].tolist()), False)
            keep(image, total, caption, batch.ids.shape[1])
    return [[caption for _, caption in best[:captions_per_image]] for best in finished]


def _lengths(decoding: Decoding, prefix_length: int) -> tuple[int, int]:
    """Return the total lengths, prefix included, between which a text may end."""
    extra = prefix_length if decoding.scoring == "openblip" else 0
    return decoding.min_tokens + extra, decoding.max_tokens + extra


def _penalise(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Return scores (R, V) in which the tokens of ids (R, T) are less likely (CTRL, sec. 4.1)."""
    if penalty == 1.0:
        return scores.clone()
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def _nucleus(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return scores with -inf for what is outside the top k, then outside the nucleus.

    The nucleus is the fewest tokens whose probabilities exceed top_p (Holtzman et al. 2020).
    """
    if top_k:
        lowest = scores.topk(min(top_k, scores.shape[1]), dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    ordered, order = scores.sort(dim=1, descending=True)
    before = ordered.softmax(dim=1).cumsum(dim=1).roll(1, dims=1)
    before[:, 0] = 0.0
    return scores.masked_fill((before > top_p).scatter(1, order, before > top_p), -torch.inf)


def _argmax(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    return probabilities.argmax(dim=1)


def _multinomial(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)


def _mixed(seed: int, index: int) -> int:
    """Return a seed of its own for each caption of an image."""
    return (seed * 1_000_003 + index) % 2**63
