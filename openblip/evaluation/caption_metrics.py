"""BLEU-1..4, ROUGE-L and CIDEr-D of captions, with the numbers of coco-caption.

Scores are fractions, CIDEr-D a number from 0 to 10 that is near 1 for human captions of COCO;
papers print all of them times 100.
Words come from `ptb.caption_words`. METEOR and SPICE need Java and are not here.

Sources: Papineni et al. 2002 (BLEU), Lin 2004 (ROUGE-L), Vedantam et al. 2015 (CIDEr-D, sigma 6),
with the details of coco-caption where the papers leave a choice.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from openblip.evaluation.ptb import caption_words

_MAX_ORDER = 4
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
# The constants of coco-caption: a precision of 0 / 0 or a reference of no words stays defined.
_BLEU_SMALL = 1e-9
_BLEU_TINY = 1e-15

_Ngram = tuple[str, ...]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one caption or of a whole set; see the module for their scale."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float

    def to_json(self) -> dict[str, float]:
        """Return the scores by name."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreReport:
    """Scores of a set of captions and of each image's caption alone.

    ROUGE-L and CIDEr-D of the set are means over images; its BLEU pools their counts first.
    """

    corpus: CaptionScores
    per_image: Mapping[str, CaptionScores]


def score_captions(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> CaptionScores:
    """Score one caption per image against the image's reference captions.

    hypotheses   image id -> caption
    references   image id -> one or more captions; they also give CIDEr-D its idf
    Returns the scores of the set.
    Raises ValueError if the image ids differ, if there are none, or if an image has no reference.
    Source: coco-caption (pycocoevalcap 1.2), whose numbers these equal.
    """
    return report_captions(hypotheses, references).corpus


def report_captions(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> ScoreReport:
    """Score one caption per image, and keep the scores of every image; see `score_captions`."""
    _check(hypotheses, references)
    images = list(hypotheses)
    hypothesis_words = [caption_words(hypotheses[image]) for image in images]
    reference_words = [[caption_words(text) for text in references[image]] for image in images]
    hypothesis_counts = [_count_ngrams(words) for words in hypothesis_words]
    reference_counts = [[_count_ngrams(words) for words in several] for several in reference_words]

    statistics = [
        _bleu_statistics(*pair) for pair in zip(hypothesis_counts, reference_counts, strict=True)
    ]
    rouge = [_rouge_l(*pair) for pair in zip(hypothesis_words, reference_words, strict=True)]
    cider = _cider_d(hypothesis_counts, reference_counts)
    per_image = {
        image: CaptionScores(*_bleu([one]), rouge_l, cider_d)
        for image, one, rouge_l, cider_d in zip(images, statistics, rouge, cider, strict=True)
    }
    mean_rouge, mean_cider = (math.fsum(values) / len(images) for values in (rouge, cider))
    return ScoreReport(CaptionScores(*_bleu(statistics), mean_rouge, mean_cider), per_image)


def _check(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not hypotheses:
        raise ValueError("no captions to score: give at least one image with a caption")
    if hypotheses.keys() != references.keys():
        odd = sorted(hypotheses.keys() ^ references.keys(), key=str)
        raise ValueError(
            f"{len(odd)} image ids have a caption or references but not both, such as {odd[:3]}: "
            "score the same images on both sides"
        )
    for image, several in references.items():
        if isinstance(several, str) or not several:
            raise ValueError(
                f"references of image {image!r} are {several!r}: give a list of captions"
            )


@dataclass(frozen=True)
class _NgramCounts:
    """N-grams of one caption by order, and its number of words."""

    by_order: tuple[Counter[_Ngram], ...]
    num_words: int


def _count_ngrams(words: Sequence[str]) -> _NgramCounts:
    # "1 1/2" is one token with a no-break space: coco-caption cuts it for n-grams, not for ROUGE-L.
    parts = " ".join(words).split()
    return _NgramCounts(
        tuple(
            Counter(zip(*(parts[shift:] for shift in range(order)), strict=False))
            for order in range(1, _MAX_ORDER + 1)
        ),
        len(parts),
    )


@dataclass(frozen=True)
class _BleuStatistics:
    """What BLEU needs of one image: clipped matches and n-grams per order, lengths in words."""

    num_matches: tuple[int, ...]
    num_ngrams: tuple[int, ...]
    num_words: int
    num_reference_words: int


def _bleu_statistics(
    hypothesis: _NgramCounts, references: Sequence[_NgramCounts]
) -> _BleuStatistics:
    matches = []
    for order, counts in enumerate(hypothesis.by_order):
        matches.append(
            sum(
                min(count, max(reference.by_order[order].get(ngram, 0) for reference in references))
                for ngram, count in counts.items()
            )
        )
    closest = min(
        (abs(reference.num_words - hypothesis.num_words), reference.num_words)
        for reference in references
    )[1]
    num_ngrams = tuple(max(0, hypothesis.num_words - order) for order in range(_MAX_ORDER))
    return _BleuStatistics(tuple(matches), num_ngrams, hypothesis.num_words, closest)


def _bleu(statistics: Sequence[_BleuStatistics]) -> tuple[float, float, float, float]:
    """BLEU-1..4 of the pooled counts: geometric mean of precisions times the brevity penalty."""
    num_words = sum(one.num_words for one in statistics)
    num_reference_words = sum(one.num_reference_words for one in statistics)
    ratio = (num_words + _BLEU_TINY) / (num_reference_words + _BLEU_SMALL)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores = []
    product = 1.0
    for order in range(_MAX_ORDER):
        num_matches = sum(one.num_matches[order] for one in statistics)
        num_ngrams = sum(one.num_ngrams[order] for one in statistics)
        product *= (num_matches + _BLEU_TINY) / (num_ngrams + _BLEU_SMALL)
        scores.append(product ** (1 / (order + 1)) * brevity_penalty)
    bleu_1, bleu_2, bleu_3, bleu_4 = scores
    return bleu_1, bleu_2, bleu_3, bleu_4


def _rouge_l(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F-measure of the best precision and the best recall, which may come from two references."""
    # coco-caption counts an empty caption as one empty word.
    hypothesis = hypothesis or [""]
    references = [reference or [""] for reference in references]
    common = [_longest_common_subsequence(hypothesis, reference) for reference in references]
    precision = max(common) / len(hypothesis)
    recall = max(
        length / len(reference) for length, reference in zip(common, references, strict=True)
    )
    if precision == 0:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    # Bit-parallel (Hyyro 2004): a zero bit marks a position of `second` where the length grows.
    positions: dict[str, int] = {}
    for position, word in enumerate(second):
        positions[word] = positions.get(word, 0) | 1 << position
    every = (1 << len(second)) - 1
    row = every
    for word in first:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(second) - row.bit_count()


@dataclass(frozen=True)
class _TfIdf:
    """One caption as tf-idf weights per order, with the norm of each."""

    weights: tuple[dict[_Ngram, float], ...]
    norms: tuple[float, ...]
    num_bigrams: int


def _cider_d(
    hypotheses: Sequence[_NgramCounts], references: Sequence[Sequence[_NgramCounts]]
) -> list[float]:
    """CIDEr-D per image: mean over orders and references of the clipped cosine, times 10."""
    # One document is an image: an n-gram counts once however many of its references hold it.
    document_frequency: Counter[_Ngram] = Counter()
    for several in references:
        document_frequency.update({n for one in several for counts in one.by_order for n in counts})
    log_num_images = math.log(len(references))
    inverse = {n: log_num_images - math.log(df) for n, df in document_frequency.items()}

    def weigh(caption: _NgramCounts) -> _TfIdf:
        weights = tuple(
            {ngram: count * inverse.get(ngram, log_num_images) for ngram, count in counts.items()}
            for counts in caption.by_order
        )
        norms = tuple(math.sqrt(sum(w * w for w in weight.values())) for weight in weights)
        # The length penalty of coco-caption compares numbers of bigrams, not of words.
        return _TfIdf(weights, norms, max(0, caption.num_words - 1))

    scores = []
    for hypothesis, several in zip(hypotheses, references, strict=True):
        weighed = weigh(hypothesis)
        total = math.fsum(_similarity(weighed, weigh(reference)) for reference in several)
        scores.append(10 * total / len(several))
    return scores


def _similarity(hypothesis: _TfIdf, reference: _TfIdf) -> float:
    """Mean cosine over orders, a hypothesis weight clipped to the reference's."""
    total = 0.0
    for order in range(_MAX_ORDER):
        weights = reference.weights[order]
        product = sum(
            min(weight, weights[ngram]) * weights[ngram]
            for ngram, weight in hypothesis.weights[order].items()
            if ngram in weights
        )
        norm = hypothesis.norms[order] * reference.norms[order]
        if norm > 0:
            product /= norm
        total += product
    num_missing = hypothesis.num_bigrams - reference.num_bigrams
    return total / _MAX_ORDER * math.exp(-(num_missing**2) / (2 * _CIDER_SIGMA**2))
