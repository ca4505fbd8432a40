"""BLIP's objectives as pure functions: tensors in, scalar out (BLIP sec. 3.2).

Letters: B pairs of the batch, Q queued features, R rows, L tokens, V vocabulary, P places of an
image ([CLS] and patches), D image width. All losses but reconstruction are in nats.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_targets(
    momentum_similarity: Tensor, positives: Tensor, temperature: Tensor, weight: float
) -> Tensor:
    """Mix what the momentum twin believes into the ground truth.

    momentum_similarity  (B, B+Q) cosine of the twin's own features
    positives            (B, B+Q) ground truth, rows sum to 1
    weight               in [0, 1]; 0 returns `positives`
    Returns              (B, B+Q), rows sum to 1
    Source: ALBEF sec. 3.3.
    """
    belief = (momentum_similarity / temperature).softmax(dim=1)
    return weight * belief + (1.0 - weight) * positives


def itc_loss(similarity: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """Cross-entropy of each row's similarities against soft targets.

    similarity   (B, B+Q) cosine, this batch first, then the queue
    targets      (B, B+Q) rows sum to 1
    temperature  () divides the cosines, > 0
    Returns      () mean over rows
    Raises ValueError if the shapes differ.
    Source: BLIP sec. 3.2; soft targets from ALBEF sec. 3.3.
    """
    if similarity.shape != targets.shape:
        raise ValueError(
            f"similarity {tuple(similarity.shape)} and targets {tuple(targets.shape)} differ"
        )
    return -((similarity / temperature).log_softmax(dim=1) * targets).sum(dim=1).mean()


def sample_hard_negatives(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one column per row in proportion to its weight.

    weights    (B, C) >= 0, 0 for what must not be drawn; every row needs one that is positive
    generator  of the draw; None takes torch's global one
    Returns    (B,) column indices
    Source: ALBEF sec. 3.2, hard negatives in proportion to the contrastive similarity.
    """
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def itm_loss(logits: Tensor, is_match: Tensor) -> Tensor:
    """Cross-entropy of match logits (R, 2) against is_match (R,) bool; mean over rows."""
    return F.cross_entropy(logits, is_match.long())


def lm_loss(
    logits: Tensor,
    token_ids: Tensor,
    text_mask: Tensor,
    *,
    prompt_length: int = 0,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Cross-entropy of every next token.

    logits           (R, L, V), position t predicts token t + 1
    token_ids        (R, L) the text itself; its first token is never predicted
    text_mask        (R, L) 1 = real token; padding is not predicted
    prompt_length    tokens at the start, the first special token included, that are given
    label_smoothing  share of the target spread over the vocabulary
    Returns          () mean over the predicted tokens of all rows
    Source: BLIP sec. 3.2, label smoothing 0.1.
    """
    targets = token_ids.masked_fill(text_mask == 0, -100)
    targets[:, :prompt_length] = -100
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=label_smoothing
    )


def text_losses(
    logits: Tensor, token_ids: Tensor, text_mask: Tensor, *, label_smoothing: float
) -> Tensor:
    """Cross-entropy of every text as a whole.

    logits, token_ids, text_mask, label_smoothing  as `lm_loss` takes them
    Returns  (R,) sum over the predicted tokens of a row; without smoothing, minus the text's
             log-probability
    """
    targets = token_ids.masked_fill(text_mask == 0, -100)[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        targets.flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(targets.shape).sum(dim=1)


def vqa_loss(losses: Tensor, weights: Tensor, num_questions: int) -> Tensor:
    """Join the losses of all answers of a batch.

    losses         (R,) of `text_losses`, all answers of all questions
    weights        (R,) of the answers
    num_questions  by which the weighted sum is divided
    Source: BLIP sec. 5.3; the released code's answers weigh their share of the annotators.
    """
    return (losses * weights).sum() / num_questions


def reconstruction_errors(predicted: Tensor, image_states: Tensor, hidden: Tensor) -> Tensor:
    """Measure how far predicted states are from those of an image, at the places that were hidden.

    predicted     (B, P, D) normalised, [CLS] first
    image_states  (B, P, D) to predict; each place is normalised here to mean 0 and variance 1
    hidden        (B, P) bool; every row has [CLS] and one patch at least
    Returns       (B,) smooth L1, mean over channels; [CLS], of which the image's embedding is made,
                  counts as much as all hidden patches together
    Raises ValueError if the shapes differ.
    """
    if predicted.shape != image_states.shape or hidden.shape != predicted.shape[:2]:
        raise ValueError(
            f"predicted {tuple(predicted.shape)}, image_states {tuple(image_states.shape)} and "
            f"hidden {tuple(hidden.shape)} differ"
        )
    targets = F.layer_norm(image_states, image_states.shape[-1:])
    errors = F.smooth_l1_loss(predicted, targets, reduction="none").mean(dim=2)
    patches = hidden[:, 1:]
    of_patches = (errors[:, 1:] * patches).sum(dim=1) / patches.sum(dim=1)
    return (errors[:, 0] + of_patches) / 2


def reconstruction_loss(predicted: Tensor, image_states: Tensor, hidden: Tensor) -> Tensor:
    """Mean of `reconstruction_errors` over the images."""
    return reconstruction_errors(predicted, image_states, hidden).mean()
