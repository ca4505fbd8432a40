"""BLIP: image encoder, MED, projections and image-text matching head (BLIP sec. 3.1, figure 2).

Letters: B images, R rows of text grouped by image, L tokens, N patches, S image side, E embedding
width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.models.context import Context, DecoderCache
from openblip.models.text import Med, MedConfig, Role, SpecialTokens
from openblip.models.vision import VisionConfig, VisionTransformer

P = TypeVar("P")

INITIAL_TEMPERATURE = 0.07
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


@dataclass(frozen=True)
class BlipConfig:
    """Everything that fixes the shape of a model.

    embedding_width  E, of the space in which images and texts are compared
    tokens           ids of the special tokens
    Raises ValueError if the text model does not expect the image encoder's width.
    """

    vision: VisionConfig
    text: MedConfig
    tokens: SpecialTokens
    embedding_width: int = 256

    def __post_init__(self) -> None:
        if self.text.context_width != self.vision.width:
            raise ValueError(
                f"text.context_width {self.text.context_width} must be "
                f"vision.width {self.vision.width}"
            )

    def with_roles(self, roles: frozenset[Role]) -> "BlipConfig":
        """Return the same sizes with other roles."""
        return replace(self, text=replace(self.text, roles=roles))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `config.json` holds them."""
        values = asdict(self)
        values["text"]["roles"] = sorted(self.text.roles)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BlipConfig":
        """Rebuild from `to_json`. Raises ValueError naming keys that are missing or unknown."""
        check_keys("config", values, cls)
        return cls(
            vision=part_from_json("vision", values["vision"], VisionConfig),
            text=part_from_json("text", values["text"], MedConfig),
            tokens=part_from_json("tokens", values["tokens"], SpecialTokens),
            embedding_width=values["embedding_width"],
        )


def part_from_json(where: str, values: Mapping[str, Any], part: type[P]) -> P:
    """Rebuild one part of a configuration. Raises ValueError as `check_keys` does."""
    check_keys(where, values, part)
    arguments = dict(values)
    if "roles" in arguments:
        arguments["roles"] = frozenset(arguments["roles"])
    return part(**arguments)


def check_keys(where: str, values: Mapping[str, Any], part: type[Any]) -> None:
    """Raise ValueError naming the fields of a dataclass that are missing, and unknown keys."""
    expected = {field.name for field in fields(part)}
    missing, unknown = expected - set(values), set(values) - expected
    if missing or unknown:
        raise ValueError(
            f"{where}: missing keys {sorted(missing) or 'none'}, "
            f"unknown keys {sorted(unknown) or 'none'}"
        )


class Blip(nn.Module):
    """One ViT and one MED. Each verb plays one role, and sets the role's first token itself."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        roles = config.text.roles
        self.vision = VisionTransformer(config.vision)
        self.text = Med(config.text)
        if "text" in roles:
            self.image_projection = nn.Linear(config.vision.width, config.embedding_width)
            self.text_projection = nn.Linear(config.text.width, config.embedding_width)
            self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        if "pair" in roles:
            self.match_head = nn.Linear(config.text.width, 2)

    @property
    def device(self) -> torch.device:
        return self.vision.class_token.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) -> image_states (B, 1 + N, width), [CLS] first."""
        states: Tensor = self.vision(images)
        return states

    def embed_image(self, image_states: Tensor) -> Tensor:
        """Project the [CLS] state -> image_embedding (B, E), unit norm."""
        self._require("text")
        return F.normalize(self.image_projection(image_states[:, 0]), dim=-1)

    def encode_text(self, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Encode text alone. token_ids, text_mask (R, L) -> text_states (R, L, width)."""
        token_ids = with_first(token_ids, self.config.tokens.cls)
        return self.text.encode_text(token_ids, text_mask)

    def embed_text(self, text_states: Tensor) -> Tensor:
        """Project the [CLS] state -> text_embedding (R, E), unit norm."""
        self._require("text")
        return F.normalize(self.text_projection(text_states[:, 0]), dim=-1)

    def project_context(self, image_states: Tensor) -> Context:
        """Project image_states once for every text that will look at them."""
        return self.text.project_context(image_states)

    def encode_pair(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Encode texts in sight of images -> pair_states (R, L, width), [ENC] first.

        Rows i * R / B to (i + 1) * R / B - 1 of token_ids and text_mask (R, L) see image i.
        """
        token_ids = with_first(token_ids, self.config.tokens.enc)
        return self.text.encode_pair(token_ids, text_mask, context)

    def match_logits(self, pair_states: Tensor) -> Tensor:
        """Judge pairs from their [ENC] state -> (R, 2) logits of not matching, matching."""
        self._require("pair")
        logits: Tensor = self.match_head(pair_states[:, 0])
        return logits

    def decode(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Predict every next token of known texts -> logits (R, L, V); rows as in `encode_pair`."""
        token_ids = with_first(token_ids, self.config.tokens.dec)
        return self.text.decode(token_ids, text_mask, context)

    def new_decoder_cache(self) -> DecoderCache:
        """Return the empty cache with which decoding starts."""
        return DecoderCache()

    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor:
        """Append token_ids (R, T) to the cache -> logits (R, V) of the token that follows.

        The first call's first token must be [DEC].
        """
        return self.text.decode_step(token_ids, cache, context)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in [0.001, 0.5], as ALBEF and BLIP do."""
        self.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)

    def _require(self, role: Role) -> None:
        if role not in self.config.text.roles:
            raise ValueError(
                f"this model has no role {role!r}; "
                f"it has: {', '.join(sorted(self.config.text.roles))}"
            )


def with_first(token_ids: Tensor, first: int) -> Tensor:
    """Return a copy of token_ids (R, L) whose first token is the role's."""
    token_ids = token_ids.clone()
    token_ids[:, 0] = first
    return token_ids
