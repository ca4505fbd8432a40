"""NLVR2: accuracy, and consistency, with the predictions that the official script reads."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from openblip.batching import read_image
from openblip.data.nlvr import NlvrPair, collate_pairs, read_pairs
from openblip.data.rows import BadSample
from openblip.models.nlvr import Nlvr
from openblip.tokenizer import Tokenizer
from openblip.training.log import ProgressLine

MAX_SENTENCE_TOKENS = 128
"""Where a sentence is cut, which the released code does after 40 words alone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NlvrReport:
    """Measures in percent, and whether each sentence was found true, by identifier.

    accuracy     of all labels; None: there are none
    consistency  sentences that were judged right with every pair of images that they come with;
                 None: the identifiers are not NLVR2's, which tell the sentence
    """

    accuracy: float | None
    consistency: float | None
    predictions: Mapping[str, bool]

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "accuracy": self.accuracy,
            "consistency": self.consistency,
            "num_sentences": len(self.predictions),
            "predictions": dict(self.predictions),
        }


def read_all_pairs(data: Path) -> list[NlvrPair]:
    """Return the pairs of a data set to measure on.

    Raises ValueError naming the first one that is unusable, and if identifiers repeat.
    """
    pairs: dict[str, NlvrPair] = {}
    for pair in read_pairs(data):
        if isinstance(pair, BadSample):
            raise ValueError(f"{data}: row {pair.key} is unusable: {pair.reason}")
        if pair.identifier in pairs:
            raise ValueError(f"{data}: the identifier {pair.identifier} stands twice")
        pairs[pair.identifier] = pair
    if not pairs:
        raise ValueError(f"{data} holds no sentence")
    return list(pairs.values())


@torch.no_grad()
def evaluate_nlvr(
    nlvr: Nlvr,
    tokenizer: Tokenizer,
    pairs: list[NlvrPair],
    *,
    batch_size: int = 32,
    is_silent: bool = False,
) -> NlvrReport:
    """Judge every sentence, and measure how many judgements are right.

    is_silent  tell no progress
    Raises ImageDecodeError for an image that is absent or bad.
    """
    size_px = nlvr.config.vision.image_size_px
    max_tokens = min(MAX_SENTENCE_TOKENS, nlvr.config.text.max_positions)
    sentences = [pair.sentence for pair in pairs]
    if num_cut := tokenizer.encode_batch(sentences, max_tokens=max_tokens).num_truncated:
        _log.warning("%d sentences are longer than %d tokens and were cut", num_cut, max_tokens)
    predictions: dict[str, bool] = {}
    with ProgressLine("judging", len(pairs), unit="sentences", is_silent=is_silent) as progress:
        for start in range(0, len(pairs), batch_size):
            several = pairs[start : start + batch_size]
            images = [
                torch.stack([read_image(data, size_px) for data in pair.read_images()])
                for pair in several
            ]
            keys = [pair.identifier for pair in several]
            batch = collate_pairs(keys, several, images, tokenizer, max_tokens)
            batch = batch.to(nlvr.device)
            context = nlvr.project_context(nlvr.encode_image(batch.images))
            states = nlvr.encode_pair(batch.token_ids, batch.text_mask, context)
            found = nlvr.truth_logits(states).argmax(dim=1).bool().tolist()
            predictions |= dict(zip(keys, found, strict=True))
            progress.advance(len(several))
    return score_nlvr(pairs, predictions)


def score_nlvr(pairs: Iterable[NlvrPair], predictions: Mapping[str, bool]) -> NlvrReport:
    """Measure predictions, by identifier, against the labels of the pairs.

    Source: metrics.py of the NLVR2 repository.
    """
    right = {
        pair.identifier: predictions[pair.identifier] == pair.label
        for pair in pairs
        if pair.label is not None
    }
    if not right:
        return NlvrReport(None, None, predictions)
    accuracy = 100.0 * sum(right.values()) / len(right)
    if any(identifier.count("-") != 3 for identifier in right):
        return NlvrReport(accuracy, None, predictions)
    sentences: dict[tuple[str, str, str], bool] = {}
    for identifier, is_right in right.items():
        # The third field is that of the pair of images.
        split, group, _, number = identifier.split("-")
        sentence = (split, group, number)
        sentences[sentence] = sentences.get(sentence, True) and is_right
    consistency = 100.0 * sum(sentences.values()) / len(sentences)
    return NlvrReport(accuracy, consistency, predictions)


def predictions_csv(predictions: Mapping[str, bool]) -> str:
    """Return what the official evaluation reads: a line `identifier,True` for each sentence."""
    return "".join(f"{identifier},{found}\n" for identifier, found in predictions.items())
