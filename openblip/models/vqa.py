"""VQA: a question is encoded in sight of an image, an answer is decoded (BLIP sec. 5.3, figure 5).

The question is encoded by one MED in the role `pair`; another one, in the role `decode`, looks at
the question's states as a captioner looks at an image's. Both start from the same pre-trained MED
and are trained apart, as in the released code.

Letters: B images or questions, R rows of text (a multiple of B), L tokens, N image positions, S
image side, D text width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openblip.models.blip import Blip, TaskStart, check_keys, part_from_json, with_first
from openblip.models.context import Context, DecoderCache
from openblip.models.text import Med, MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig, VisionTransformer


@dataclass(frozen=True)
class VqaConfig:
    """Everything that fixes the shape of a model.

    question  has the role `pair` alone and looks at the image states
    answer    has the role `decode` alone and looks at the question states
    Raises ValueError for other roles, and if a part does not expect the width that it looks at.
    """

    vision: VisionConfig
    question: MedConfig
    answer: MedConfig
    tokens: SpecialTokens

    def __post_init__(self) -> None:
        for name, med, role, seen, width in (
            ("question", self.question, "pair", "vision", self.vision.width),
            ("answer", self.answer, "decode", "question", self.question.width),
        ):
            if med.roles != {role}:
                raise ValueError(f"{name}.roles {sorted(med.roles)} must be [{role!r}]")
            if med.context_width != width:
                raise ValueError(
                    f"{name}.context_width {med.context_width} must be {seen}.width {width}"
                )
        if self.question.vocab_size != self.answer.vocab_size:
            raise ValueError(
                f"question.vocab_size {self.question.vocab_size} and answer.vocab_size "
                f"{self.answer.vocab_size} must be the same"
            )

    @property
    def text(self) -> MedConfig:
        """The question MED; in a model that starts from a Blip its sizes are the answer MED's."""
        return self.question

    @classmethod
    def from_text(cls, vision: VisionConfig, text: MedConfig, tokens: SpecialTokens) -> "VqaConfig":
        """Return a model whose two MEDs have the sizes of a Blip's."""
        return cls(
            vision,
            replace(text, roles=frozenset({"pair"})),
            replace(text, roles=frozenset({"decode"}), context_width=text.width),
            tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `config.json` holds them."""
        values = {"task": "vqa", **asdict(self)}
        values["question"]["roles"] = sorted(self.question.roles)
        values["answer"]["roles"] = sorted(self.answer.roles)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "VqaConfig":
        """Rebuild from `to_json` without the task.

        Raises ValueError naming keys that are missing or unknown.
        """
        check_keys("config", values, cls)
        return cls(
            vision=part_from_json("vision", values["vision"], VisionConfig),
            question=part_from_json("question", values["question"], MedConfig),
            answer=part_from_json("answer", values["answer"], MedConfig),
            tokens=part_from_json("tokens", values["tokens"], SpecialTokens),
        )


class Vqa(nn.Module):
    """One ViT, a MED for questions and a MED for answers."""

    def __init__(self, config: VqaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.question = Med(config.question)
        self.answer = Med(config.answer)

    @property
    def device(self) -> torch.device:
        return self.vision.class_token.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) -> image_states (B, 1 + N, width), [CLS] first."""
        states: Tensor = self.vision(images)
        return states

    def project_image(self, image_states: Tensor) -> Context:
        """Project image_states once for every question that will look at them."""
        return self.question.project_context(image_states)

    def encode_question(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Encode questions in sight of images -> question_states (R, L, D), [ENC] first.

        Rows i * R / B to (i + 1) * R / B - 1 of token_ids and text_mask (R, L) see image i.
        """
        token_ids = with_first(token_ids, self.config.tokens.enc)
        return self.question.encode_pair(token_ids, text_mask, context)

    def project_question(self, question_states: Tensor, text_mask: Tensor) -> Context:
        """Project question_states (B, L, D) once for every answer; answers see no padding."""
        return replace(self.answer.project_context(question_states), mask=text_mask)

    def decode(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Predict every next token of known answers -> logits (R, L, V).

        Rows i * R / B to (i + 1) * R / B - 1 of token_ids and text_mask (R, L) see question i.
        """
        token_ids = with_first(token_ids, self.config.tokens.dec)
        return self.answer.decode(token_ids, text_mask, context)

    def new_decoder_cache(self) -> DecoderCache:
        """Return the empty cache with which decoding starts."""
        return DecoderCache()

    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor:
        """Append token_ids (R, T) to the cache -> logits (R, V) of the token that follows.

        The first call's first token must be [DEC].
        """
        return self.answer.decode_step(token_ids, cache, context)


def vqa_from_blip(blip: Blip) -> TaskStart[Vqa]:
    """Return the model that training starts from, each MED from the BLIP's one.

    Where image and text widths differ, the keys and values by which answers look at questions have
    another shape than those for images, and are drawn.
    Raises ValueError for a BLIP without the roles `pair` and `decode`.
    Source: `load_checkpoint` of the released blip.py, which draws the same tensors.
    """
    config = blip.config
    if not config.text.roles >= {"pair", "decode"}:
        raise ValueError(
            f"roles {sorted(config.text.roles)}: questions are answered from a model with the "
            "roles 'pair' and 'decode'"
        )
    vqa = Vqa(VqaConfig.from_text(config.vision, config.text, config.tokens))
    theirs, ours = blip.state_dict(), vqa.state_dict()
    sources = {name: _blip_name(name) for name in ours}
    read = {
        name: theirs[source]
        for name, source in sources.items()
        if theirs[source].shape == ours[name].shape
    }
    drawn = tuple(sorted(ours.keys() - read.keys()))
    vqa.load_state_dict(ours | read)
    left_out = theirs.keys() - {sources[name] for name in read}
    return TaskStart(vqa, tuple(sorted(left_out)), drawn)


def _blip_name(name: str) -> str:
    part, _, rest = name.partition(".")
    return name if part == "vision" else f"text.{rest}"
