"""Labels of a user's own for images that no classifier was trained on.

Letters: I images, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from openblip.results import LabelGuess, Labels

DEFAULT_TEMPLATES = (
    "a picture of {}",
    "a picture of a {}",
    "a photo of the {}",
    "there is a {} in the picture",
    "a close-up of a {}",
)
"""Sentences that a label is put into, at `{}`."""

LabelScore = Literal["itc", "itm", "both"]


def label_sentences(names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Put labels into templates: the sentences of the first label, of the second, ...

    Raises ValueError for no or repeated labels, and for a template without its place.
    """
    if not names or not templates:
        raise ValueError(f"{len(names)} labels and {len(templates)} templates; give some of both")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"labels that stand more than once: {', '.join(repeated)}")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"templates need one {{}} for the label; these do not: {wrong}")
    return tuple(template.replace("{}", name) for name in names for template in templates)


@dataclass(frozen=True)
class LabelScores:
    """How C labels fit I images, all (I, C).

    similarity      ITC cosines
    match_log_odds  of ITM, the mean over a label's sentences; None where it was not asked
    logits          their softmax are the shares of an image's labels
    """

    similarity: Tensor
    match_log_odds: Tensor | None
    logits: Tensor

    @classmethod
    def of(
        cls,
        score: LabelScore,
        similarity: Tensor,
        temperature: float,
        match_log_odds: Tensor | None = None,
    ) -> "LabelScores":
        """Make logits of what was measured; `temperature` is the model's own.

        itc   the cosines over the temperature, as ITC is trained
        itm   the log-odds as they are: of labels that exclude each other and one of which is true,
              each is as probable as its odds are high
        both  their sum. ITM is trained on wrong texts drawn by ITC's softmax, so its log-odds hold
              what speaks for a text beyond what ITC has said
        """
        itc = similarity / temperature
        if score == "itc":
            return cls(similarity, match_log_odds, itc)
        assert match_log_odds is not None
        logits = match_log_odds if score == "itm" else itc + match_log_odds
        return cls(similarity, match_log_odds, logits)

    def guesses(self, labels: Labels, temperature: float = 1.0) -> list[list[LabelGuess]]:
        """Return each image's labels, the best first.

        temperature  divides the logits
        """
        shares = (self.logits / temperature).softmax(dim=1)
        ranked = self.logits.sort(dim=1, descending=True, stable=True).indices
        odds = self.match_log_odds
        return [
            [
                LabelGuess(
                    labels.names[label],
                    float(shares[image, label]),
                    float(self.similarity[image, label]),
                    None if odds is None else float(odds[image, label].sigmoid()),
                )
                for label in order
            ]
            for image, order in enumerate(ranked.tolist())
        ]
