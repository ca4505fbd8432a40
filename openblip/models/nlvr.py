"""NLVR2: is a sentence true of two images? (BLIP sec. 5.4, figure 5)

Every layer of the MED has two cross-attentions, one per image, which start from the same weights.
What they find is averaged in the early layers and merged by a linear map in the later ones; the
[ENC] state is classified.

Letters: B pairs of images, R sentences (a multiple of B), L tokens, N image positions, S image
side, D text width, H heads.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.models.blip import Blip, TaskStart, check_keys, part_from_json, with_first
from openblip.models.context import Context
from openblip.models.text import ImageAttention, Med, MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig, VisionTransformer

FIRST_MERGE_LAYER = 6
"""As in the released code, whatever the number of layers: half of the paper's twelve."""


@dataclass(frozen=True)
class NlvrConfig:
    """Everything that fixes the shape of a model.

    text               has the role `pair` alone
    first_merge_layer  counted from 0; none, if there are no more layers
    Raises ValueError for other roles, and if the text model does not expect the image encoder's
    width.
    """

    vision: VisionConfig
    text: MedConfig
    tokens: SpecialTokens
    first_merge_layer: int = FIRST_MERGE_LAYER

    def __post_init__(self) -> None:
        if self.text.roles != {"pair"}:
            raise ValueError(f"text.roles {sorted(self.text.roles)} must be ['pair']")
        if self.text.context_width != self.vision.width:
            raise ValueError(
                f"text.context_width {self.text.context_width} must be "
                f"vision.width {self.vision.width}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `config.json` holds them."""
        values = {"task": "nlvr", **asdict(self)}
        values["text"]["roles"] = sorted(self.text.roles)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "NlvrConfig":
        """Rebuild from `to_json` without the task.

        Raises ValueError naming keys that are missing or unknown.
        """
        check_keys("config", values, cls)
        return cls(
            vision=part_from_json("vision", values["vision"], VisionConfig),
            text=part_from_json("text", values["text"], MedConfig),
            tokens=part_from_json("tokens", values["tokens"], SpecialTokens),
            first_merge_layer=values["first_merge_layer"],
        )


class PairCrossAttention(nn.Module):
    """Attention of text to two images, each with weights of its own, and one LayerNorm."""

    def __init__(self, config: MedConfig, has_merge: bool) -> None:
        super().__init__()
        self.first, self.second = ImageAttention(config), ImageAttention(config)
        self.first_output = nn.Linear(config.width, config.width)
        self.second_output = nn.Linear(config.width, config.width)
        self.merge = nn.Linear(2 * config.width, config.width) if has_merge else None
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def project_context(self, image_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of pairs, each (B, H, 2N, D / H), the first image's in front.

        image_states  (2B, N, context width), all first images before all second ones
        """
        first, second = image_states.chunk(2)
        of_first, of_second = self.first.project_context(first), self.second.project_context(second)
        key, value = (torch.cat(both, dim=2) for both in zip(of_first, of_second, strict=True))
        return key, value

    def forward(self, states: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        assert visible is None, "image states have no padding"
        first_key, second_key = key.chunk(2, dim=2)
        first_value, second_value = value.chunk(2, dim=2)
        first = self.first_output(self.first.attend(states, first_key, first_value, None))
        second = self.second_output(self.second.attend(states, second_key, second_value, None))
        if self.merge is None:
            found = (first + second) / 2
        else:
            found = self.merge(torch.cat([first, second], dim=-1))
        normed: Tensor = self.norm(F.dropout(found, self.dropout, self.training) + states)
        return normed


class Nlvr(nn.Module):
    """One ViT, one MED that looks at two images, and a classifier."""

    def __init__(self, config: NlvrConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.text = Med(
            config.text,
            lambda text, layer: PairCrossAttention(text, layer >= config.first_merge_layer),
        )
        width = config.text.width
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @property
    def device(self) -> torch.device:
        return self.vision.class_token.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (2B, 3, S, S) -> image_states (2B, 1 + N, width), [CLS] first."""
        states: Tensor = self.vision(images)
        return states

    def project_context(self, image_states: Tensor) -> Context:
        """Project image_states (2B, ...), all first images before all second ones, to B pairs.

        Raises ValueError for an odd number of images.
        """
        if image_states.shape[0] % 2:
            raise ValueError(f"{image_states.shape[0]} images are no pairs")
        return self.text.project_context(image_states)

    def encode_pair(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Encode sentences in sight of pairs of images -> pair_states (R, L, D), [ENC] first.

        Rows i * R / B to (i + 1) * R / B - 1 of token_ids and text_mask (R, L) see pair i.
        """
        token_ids = with_first(token_ids, self.config.tokens.enc)
        return self.text.encode_pair(token_ids, text_mask, context)

    def truth_logits(self, pair_states: Tensor) -> Tensor:
        """Judge sentences from their [ENC] state -> (R, 2) logits of false, true."""
        logits: Tensor = self.classifier(pair_states[:, 0])
        return logits


def nlvr_from_blip(blip: Blip, first_merge_layer: int = FIRST_MERGE_LAYER) -> TaskStart[Nlvr]:
    """Return the model that training starts from; merge layers and classifier are drawn.

    Both cross-attentions of a layer start as the BLIP's one.
    Raises ValueError for a BLIP without the role `pair`.
    Source: `load_checkpoint` of the released blip_nlvr.py.
    """
    if "pair" not in blip.config.text.roles:
        raise ValueError(
            f"roles {sorted(blip.config.text.roles)}: two images are judged from a model with "
            "the role 'pair'"
        )
    config = blip.config.with_roles(frozenset({"pair"}))
    nlvr = Nlvr(NlvrConfig(config.vision, config.text, config.tokens, first_merge_layer))
    theirs, ours = blip.state_dict(), nlvr.state_dict()
    sources = {name: _SIDE.sub(_blip_name, name) for name in ours}
    read = {name: theirs[source] for name, source in sources.items() if source in theirs}
    nlvr.load_state_dict(ours | read)
    left_out = theirs.keys() - {sources[name] for name in read}
    return TaskStart(nlvr, tuple(sorted(left_out)), tuple(sorted(ours.keys() - read.keys())))


_SIDE = re.compile(r"\.cross\.(first_output|second_output|first|second|norm)\.")


def _blip_name(found: re.Match[str]) -> str:
    match found[1]:
        case "first" | "second":
            return ".cross."
        case "norm":
            return ".cross.output.norm."
        case _:
            return ".cross.output.linear."
