"""ITC and ITM together, as pre-training and retrieval fine-tuning share them (BLIP sec. 3.2).

Letters: B pairs of the batch, Q queued pairs, E embedding width, L tokens.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.losses import itc_loss, itm_loss, sample_hard_negatives, soft_targets
from openblip.models.blip import Blip
from openblip.models.context import Context
from openblip.training.distributed import world
from openblip.training.momentum import FeatureQueue, MomentumTwin, QueueEntries

MOMENTUM_MINING_FLOOR = 1e-4
"""Added to the mining weights of pre-training, so that every negative can be drawn."""


@dataclass(frozen=True)
class AlignmentConfig:
    """How pairs are aligned; the defaults are the paper's pre-training.

    positives   `pair`: a text belongs to its own image alone. `image`: to every image of its id.
                `image_or_text`: also to images whose text is the same; for small data in which
                captions repeat
    mining      similarity in proportion to which hard negatives are drawn: `momentum` compares
                online with momentum embeddings (pre-training), `online` online ones (retrieval).
                `uniform` draws any: for a model from nothing on little data, whose ITM head finds
                nothing beyond ITC to tell a hard negative by
    negatives   where ITM's are drawn: among the pairs of this `rank`, as the original, or of
                `all_ranks`, which encodes the context of every image on every rank
    queue_size  momentum features kept as further negatives
    momentum    of the twin
    """

    positives: Literal["pair", "image", "image_or_text"] = "pair"
    mining: Literal["momentum", "online", "uniform"] = "momentum"
    negatives: Literal["rank", "all_ranks"] = "rank"
    queue_size: int = 57600
    momentum: float = 0.995


@dataclass(frozen=True)
class AlignmentOutput:
    """Losses in nats, and what the step needs after the optimizer has moved.

    itc, itm              scalars
    match_logits          (P, 2) of all judged pairs, true pairs first
    num_without_negative  rows left out of ITM because every candidate is a positive
    entries               what `after_optimizer_step` puts into the queue
    """

    itc: Tensor
    itm: Tensor
    match_logits: Tensor
    num_without_negative: int
    entries: QueueEntries


@dataclass(frozen=True)
class WrongTexts:
    """Texts from elsewhere that some images of a batch are judged with, instead of a drawn one.

    rows                  (R,) images of the batch
    token_ids, text_mask  (R, L') one text for each
    """

    rows: Tensor
    token_ids: Tensor
    text_mask: Tensor


Draw = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidates:
    """C pairs among which the negatives of a batch are drawn; the batch's own are among them.

    context                          of the images, projected
    token_ids, text_mask             (C, L)
    image_embedding, text_embedding  (C, E) to mine by
    image_ids, text_ids              (C,)
    first                            place of the batch's first pair
    """

    context: Context
    token_ids: Tensor
    text_mask: Tensor
    image_embedding: Tensor
    text_embedding: Tensor
    image_ids: Tensor
    text_ids: Tensor
    first: int = 0

    def of_all_ranks(self, blip: Blip, image_states: Tensor) -> "Candidates":
        """Return the pairs of all ranks, whose batches are equally long.

        image_states  (B, 1+N, D) of this rank; gradients flow back to those of the others
        """
        ranks = world()
        if ranks.size == 1:
            return self
        [length] = ranks.largest([self.token_ids.shape[1]])
        padded = length - self.token_ids.shape[1]
        token_ids = F.pad(self.token_ids, (0, padded), value=blip.config.tokens.pad)
        return Candidates(
            blip.project_context(ranks.gather_with_gradient(image_states)),
            ranks.gather(token_ids),
            ranks.gather(F.pad(self.text_mask, (0, padded))),
            ranks.gather(self.image_embedding),
            ranks.gather(self.text_embedding),
            ranks.gather(self.image_ids),
            ranks.gather(self.text_ids),
            first=ranks.rank * self.token_ids.shape[0],
        )


class Alignment(nn.Module):
    """The momentum twin, the queue, and the two losses that they serve."""

    def __init__(self, blip: Blip, config: AlignmentConfig) -> None:
        super().__init__()
        self.config = config
        self.twin = MomentumTwin(blip, config.momentum)
        self.queue = FeatureQueue(config.queue_size, blip.config.embedding_width)

    def forward(
        self,
        blip: Blip,
        images: Tensor,
        image_states: Tensor,
        context: Context,
        token_ids: Tensor,
        text_mask: Tensor,
        image_ids: Tensor,
        text_ids: Tensor,
        soft_target_weight: float,
        draw: Draw | None = None,
        wrong_texts: WrongTexts | None = None,
    ) -> AlignmentOutput:
        """Compute both losses of a batch.

        images                (B, 3, S, S), for the momentum twin
        image_states          (B, 1+N, D) of the online image encoder
        context               the same, projected
        token_ids, text_mask  (B, L)
        image_ids, text_ids   (B,) equal where the image, or the text, is the same
        soft_target_weight    share of the momentum twin's belief in the ITC targets
        draw                  maps mining weights (B, C) to one column per row (B,)
        wrong_texts           takes the place of what is drawn for the images that it names
        """
        image_embedding = blip.embed_image(image_states)
        text_embedding = blip.embed_text(blip.encode_text(token_ids, text_mask))
        cls_first = token_ids.clone()
        cls_first[:, 0] = blip.config.tokens.cls
        momentum_image, momentum_text = self.twin.embed(images, cls_first, text_mask)

        all_images = torch.cat([momentum_image, self.queue.image_embedding])
        all_texts = torch.cat([momentum_text, self.queue.text_embedding])
        image_to_text = image_embedding @ all_texts.T
        text_to_image = text_embedding @ all_images.T
        queue = self.queue
        is_positive = self._is_positive(
            image_ids,
            text_ids,
            torch.cat([image_ids, queue.image_ids]),
            torch.cat([text_ids, queue.text_ids]),
        ).float()
        positives = is_positive / is_positive.sum(dim=1, keepdim=True)
        with torch.no_grad():
            image_targets, text_targets = (
                soft_targets(feature @ others.T, positives, blip.temperature, soft_target_weight)
                for feature, others in ((momentum_image, all_texts), (momentum_text, all_images))
            )
        itc = (
            itc_loss(image_to_text, image_targets, blip.temperature)
            + itc_loss(text_to_image, text_targets, blip.temperature)
        ) / 2

        if self.config.mining == "momentum":
            candidate_image, candidate_text = momentum_image, momentum_text
        else:
            candidate_image, candidate_text = image_embedding, text_embedding
        candidates = Candidates(
            context, token_ids, text_mask, candidate_image, candidate_text, image_ids, text_ids
        )
        if self.config.negatives == "all_ranks":
            candidates = candidates.of_all_ranks(blip, image_states)
        with torch.no_grad():
            same = self._is_positive(
                image_ids, text_ids, candidates.image_ids, candidates.text_ids, candidates.first
            )
            image_weights, text_weights = (
                self._mining_weights(embedding @ others.T, same, blip.temperature)
                for embedding, others in (
                    (text_embedding, candidates.image_embedding),
                    (image_embedding, candidates.text_embedding),
                )
            )
        match_logits, is_match, num_left_out = _match(
            blip, candidates, image_weights, text_weights, draw, wrong_texts
        )
        return AlignmentOutput(
            itc=itc,
            itm=itm_loss(match_logits, is_match),
            match_logits=match_logits,
            num_without_negative=num_left_out,
            entries=QueueEntries(momentum_image, momentum_text, image_ids, text_ids),
        )

    def _mining_weights(self, similarity: Tensor, same: Tensor, temperature: Tensor) -> Tensor:
        """Return how likely each candidate (B, C) is drawn as a negative, up to a factor."""
        if self.config.mining == "uniform":
            return (~same).float()
        floor = MOMENTUM_MINING_FLOOR if self.config.mining == "momentum" else 0.0
        return ((similarity / temperature).softmax(dim=1) + floor).masked_fill(same, 0.0)

    def after_optimizer_step(self, blip: Blip, entries: list[QueueEntries]) -> None:
        """Queue the step's features, of all ranks, clamp the temperature, move the twin.

        The original does the last two at the start of the next forward: the same sequence.
        """
        for batch in entries:
            fields = (getattr(batch, field.name) for field in dataclasses.fields(batch))
            self.queue.enqueue(QueueEntries(*map(world().gather, fields)))
        blip.clamp_temperature()
        self.twin.update(blip)

    def _is_positive(
        self,
        image_ids: Tensor,
        text_ids: Tensor,
        other_image_ids: Tensor,
        other_text_ids: Tensor,
        first: int = 0,
    ) -> Tensor:
        """Return (B, M) bool: whether a pair of the batch and another belong together.

        first  place of the batch's first pair among the others
        """
        if self.config.positives == "pair":
            rows = torch.arange(len(image_ids), device=image_ids.device)
            columns = torch.arange(len(other_image_ids), device=image_ids.device)
            return first + rows[:, None] == columns
        is_same = image_ids[:, None] == other_image_ids
        if self.config.positives == "image_or_text":
            is_same |= text_ids[:, None] == other_text_ids
        return is_same


def _match(
    blip: Blip,
    candidates: Candidates,
    image_weights: Tensor,
    text_weights: Tensor,
    draw: Draw | None,
    wrong_texts: WrongTexts | None,
) -> tuple[Tensor, Tensor, int]:
    """Judge the true pairs, then each text with a hard image, then each image with a hard text.

    image_weights (B, C): text by image; text_weights (B, C): image by text; 0: never drawn.
    wrong_texts: judged instead of the hard text, also for an image that has none.
    Returns match logits (P, 2), is_match (P,) bool, and how many rows had no negative.
    """
    num_pairs, num_candidates = image_weights.shape
    rows = torch.arange(num_pairs, device=image_weights.device)
    has_image = image_weights.sum(dim=1) > 0
    has_text = text_weights.sum(dim=1) > 0
    hard_images = _draw_or_multinomial(draw, image_weights[has_image])
    hard_texts = _draw_or_multinomial(draw, text_weights[has_text])
    token_ids, text_mask = candidates.token_ids, candidates.text_mask
    if wrong_texts is not None:
        text_of = rows.clone()
        text_of[has_text] = hard_texts
        text_of[wrong_texts.rows] = num_candidates + rows[: len(wrong_texts.rows)]
        has_text[wrong_texts.rows] = True
        hard_texts = text_of[has_text]
        token_ids = _stack([token_ids, wrong_texts.token_ids], blip.config.tokens.pad)
        text_mask = _stack([text_mask, wrong_texts.text_mask], 0)
    own = candidates.first + rows
    image_rows = torch.cat([own, hard_images, own[has_text]])
    text_rows = torch.cat([own, own[has_image], hard_texts])
    pair_states = blip.encode_pair(
        token_ids[text_rows], text_mask[text_rows], candidates.context.select(image_rows)
    )
    is_match = torch.arange(image_rows.shape[0], device=rows.device) < num_pairs
    left_out = 2 * num_pairs - hard_images.shape[0] - hard_texts.shape[0]
    return blip.match_logits(pair_states), is_match, left_out


def _stack(parts: list[Tensor], padding: int) -> Tensor:
    """Return the rows (., L) of all parts, padded to the longest."""
    length = max(rows.shape[1] for rows in parts)
    return torch.cat([F.pad(rows, (0, length - rows.shape[1]), value=padding) for rows in parts])


def _draw_or_multinomial(draw: Draw | None, weights: Tensor) -> Tensor:
    if not weights.shape[0]:
        return torch.zeros(0, dtype=torch.long, device=weights.device)
    return draw(weights) if draw is not None else sample_hard_negatives(weights, None)
