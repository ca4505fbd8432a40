"""Decoding: greedy, beam and nucleus over cached steps, for the image-grounded decoder.

Letters: B images, K rows per image (beams or captions), R = B * K rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from openblip.models.context import Context, DecoderCache
from openblip.models.text import SpecialTokens

NEGLIGIBLE = -1e9
"""Starting score of all beams but the first, which would otherwise be its copies."""


class Decoder(Protocol):
    """A model that continues texts, as `Blip` and `Vqa` do."""

    def new_decoder_cache(self) -> DecoderCache: ...

    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor: ...


Sampler = Callable[[Tensor, Sequence[torch.Generator]], Tensor]


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


@dataclass(frozen=True)
class Generated:
    """One decoded caption.

    token_ids          new tokens, without prompt and [SEP]
    log_probabilities  of those tokens, and of [SEP] if it came, under the model's own distribution
    is_finished        whether [SEP] came before max_tokens
    """

    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    is_finished: bool

    @property
    def mean_log_probability(self) -> float:
        return sum(self.log_probabilities) / max(1, len(self.log_probabilities))


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
) -> list[list[Generated]]:
    """Decode captions of B images.

    context     of the images, B
    prompt_ids  tokens after [DEC] that are given
    seeds       one per image: what is drawn for it depends on nothing else in the batch
    sample      draws one token per row from probabilities (R, V); for tests
    Returns     per image `captions_per_image` captions, of beam search the best ones
    Raises ValueError if more captions are asked for than the method has.
    """
    if len(seeds) != context.num_images:
        raise ValueError(f"{len(seeds)} seeds for {context.num_images} images")
    most = {"greedy": 1, "beam": decoding.num_beams}.get(decoding.method)
    if captions_per_image < 1 or (most is not None and captions_per_image > most):
        raise ValueError(
            f"captions_per_image {captions_per_image}: {decoding.method} gives 1 to {most or 'any'}"
        )
    prefix = [tokens.dec, *prompt_ids]
    if decoding.method == "beam":
        return _beam(decoder, context, prefix, tokens, decoding, captions_per_image)
    draw = _argmax if decoding.method == "greedy" else sample or _multinomial
    return _step_by_step(
        decoder, context, prefix, tokens, decoding, seeds, captions_per_image, draw
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
) -> list[list[Generated]]:
    num_rows = context.num_images * captions_per_image
    device = context.keys[0].device
    generators = [
        torch.Generator(device).manual_seed(_mixed(seed, index))
        for seed in seeds
        for index in range(captions_per_image)
    ]
    ids = torch.tensor(prefix, device=device).repeat(num_rows, 1)
    log_probabilities = torch.zeros(num_rows, 0, device=device)
    is_done = torch.zeros(num_rows, dtype=torch.bool, device=device)
    cache, newest = decoder.new_decoder_cache(), ids
    min_length, max_length = _lengths(decoding, len(prefix))
    while ids.shape[1] < max_length and not is_done.all():
        logits = decoder.decode_step(newest, cache, context).float()
        scores = _penalise(logits, ids, decoding.repetition_penalty)
        if ids.shape[1] < min_length:
            scores[:, tokens.sep] = -torch.inf
        if decoding.method == "nucleus":
            scores = _nucleus(scores / decoding.temperature, decoding.top_k, decoding.top_p)
        chosen = draw(scores.softmax(dim=1), generators).masked_fill(is_done, tokens.pad)
        gained = logits.log_softmax(dim=1).gather(1, chosen[:, None])
        log_probabilities = torch.cat([log_probabilities, gained], dim=1)
        newest = chosen[:, None]
        ids = torch.cat([ids, newest], dim=1)
        is_done |= chosen == tokens.sep
    rows = [
        _finish(row[len(prefix) :], gains, tokens)
        for row, gains in zip(ids.tolist(), log_probabilities.tolist(), strict=True)
    ]
    return [rows[i : i + captions_per_image] for i in range(0, num_rows, captions_per_image)]


def _beam(
    decoder: Decoder,
    context: Context,
    prefix: list[int],
    tokens: SpecialTokens,
    decoding: Decoding,
    captions_per_image: int,
) -> list[list[Generated]]:
    """Search with K beams per image, as transformers 4.15 does but for what `scoring` changes."""
    num_images, num_beams = context.num_images, decoding.num_beams
    device = context.keys[0].device
    is_legacy = decoding.scoring == "transformers-4.15"
    min_length, max_length = _lengths(decoding, len(prefix))
    not_counted = 0 if is_legacy else len(prefix)
    ids = torch.tensor(prefix, device=device).repeat(num_images * num_beams, 1)
    gains = torch.zeros(num_images * num_beams, 0, device=device)
    totals = torch.full((num_images, num_beams), NEGLIGIBLE, device=device)
    totals[:, 0] = 0.0
    finished: list[list[tuple[float, Generated]]] = [[] for _ in range(num_images)]
    is_done = [False] * num_images
    cache, newest = decoder.new_decoder_cache(), ids

    def keep(image: int, total: float, caption: Generated, length: int) -> None:
        score = total / max(1, length - not_counted) ** decoding.length_penalty
        finished[image] = sorted(
            [*finished[image], (score, caption)], key=lambda item: item[0], reverse=True
        )[:num_beams]

    while ids.shape[1] < max_length and not all(is_done):
        length = ids.shape[1]
        # The released code leaves out the token that is being added; in ours even [SEP] counts.
        counted = length if is_legacy else length + 1
        logits = decoder.decode_step(newest, cache, context).float()
        own = logits.log_softmax(dim=1)
        if is_legacy:
            scores = _penalise(own, ids, decoding.repetition_penalty)
        else:
            scores = _penalise(logits, ids, decoding.repetition_penalty).log_softmax(dim=1)
        if length < min_length:
            scores[:, tokens.sep] = -torch.inf
        vocabulary = scores.shape[1]
        sums = (scores.view(num_images, num_beams, -1) + totals[:, :, None]).flatten(1)
        best, places = sums.topk(2 * num_beams, dim=1)
        origins, chosen = places // vocabulary, places % vocabulary
        rows, next_ids, next_totals = [], [], []
        for image in range(num_images):
            first = image * num_beams
            candidates = list(
                zip(
                    best[image].tolist(),
                    origins[image].tolist(),
                    chosen[image].tolist(),
                    strict=True,
                )
            )
            if not is_done[image]:
                for total, origin, token in candidates[:num_beams]:
                    if token == tokens.sep:
                        row = first + origin
                        caption = Generated(
                            tuple(ids[row, len(prefix) :].tolist()),
                            (*gains[row].tolist(), float(own[row, token])),
                            True,
                        )
                        keep(image, total, caption, counted)
            going = [c for c in candidates if c[2] != tokens.sep][:num_beams]
            for total, origin, token in going:
                rows.append(first + origin)
                next_ids.append(token)
                next_totals.append(total)
            if len(finished[image]) == num_beams and not is_done[image]:
                reachable = candidates[0][0]
                divisor = max(1, counted - not_counted) ** decoding.length_penalty
                is_done[image] = finished[image][-1][0] >= reachable / divisor
        order = torch.tensor(rows, device=device)
        newest = torch.tensor(next_ids, device=device)[:, None]
        totals = torch.tensor(next_totals, device=device).view(num_images, num_beams)
        gains = torch.cat([gains[order], own[order].gather(1, newest)], dim=1)
        ids = torch.cat([ids[order], newest], dim=1)
        cache.reorder(order)
    for image in range(num_images):
        if is_done[image]:
            continue
        for beam in range(num_beams):
            row = image * num_beams + beam
            caption = Generated(
                tuple(ids[row, len(prefix) :].tolist()), tuple(gains[row].tolist()), False
            )
            keep(image, float(totals[image, beam]), caption, ids.shape[1])
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


def _finish(ids: list[int], gains: list[float], tokens: SpecialTokens) -> Generated:
    if tokens.sep in ids:
        end = ids.index(tokens.sep)
        return Generated(tuple(ids[:end]), tuple(gains[: end + 1]), True)
    return Generated(tuple(ids), tuple(gains), False)


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
