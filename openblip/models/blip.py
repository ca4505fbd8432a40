"""BLIP: image encoder, MED, projections and image-text matching head (BLIP sec. 3.1, figure 2).

Letters: B images, R rows of text grouped by image, L tokens, N patches, S image side, E embedding
width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.models.context import Context, DecoderCache
from openblip.models.reconstruction import ReconstructionConfig, ReconstructionHead, ways_to_see
from openblip.models.text import Med, MedConfig, Role, SpecialTokens
from openblip.models.vision import VisionConfig, VisionTransformer

P = TypeVar("P")
T = TypeVar("T", bound=nn.Module)

INITIAL_TEMPERATURE = 0.07
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


@dataclass(frozen=True)
class BlipConfig:
    """Everything that fixes the shape of a model.

    embedding_width  E, of the space in which images and texts are compared
    tokens           ids of the special tokens
    reconstruction   of the head that predicts hidden patches from a text; None where there is none
    Raises ValueError if the text model does not expect the image encoder's width.
    """

    vision: VisionConfig
    text: MedConfig
    tokens: SpecialTokens
    embedding_width: int = 256
    reconstruction: ReconstructionConfig | None = None

    def __post_init__(self) -> None:
        if self.text.context_width != self.vision.width:
            raise ValueError(
                f"text.context_width {self.text.context_width} must be "
                f"vision.width {self.vision.width}"
            )

    def with_roles(self, roles: frozenset[Role]) -> "BlipConfig":
        """Return the same sizes with other roles, and without a reconstruction head."""
        return replace(self, text=replace(self.text, roles=roles), reconstruction=None)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `config.json` holds them."""
        values = asdict(self)
        values["text"]["roles"] = sorted(self.text.roles)
        if self.reconstruction is None:
            del values["reconstruction"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BlipConfig":
        """Rebuild from `to_json`. Raises ValueError naming keys that are missing or unknown."""
        values = {"reconstruction": None, **values}
        check_keys("config", values, cls)
        head = values["reconstruction"]
        return cls(
            vision=part_from_json("vision", values["vision"], VisionConfig),
            text=part_from_json("text", values["text"], MedConfig),
            tokens=part_from_json("tokens", values["tokens"], SpecialTokens),
            embedding_width=values["embedding_width"],
            reconstruction=None
            if head is None
            else part_from_json("reconstruction", head, ReconstructionConfig),
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
        if config.reconstruction is not None:
            self.reconstruction_head = ReconstructionHead(
                config.reconstruction, config.vision, config.text.width
            )

    @property
    def device(self) -> torch.device:
        return self.vision.class_token.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) -> image_states (B, 1 + N, width), [CLS] first."""
        states: Tensor = self.vision(images)
        return states

    def embed_image(self, image_states: Tensor) -> Tensor:
        """Project the [CLS] state -> image_embedding (B, E), unit norm."""
        self.require("text")
        return F.normalize(self.image_projection(image_states[:, 0]), dim=-1)

    def encode_text(self, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Encode text alone. token_ids, text_mask (R, L) -> text_states (R, L, width)."""
        token_ids = with_first(token_ids, self.config.tokens.cls)
        return self.text.encode_text(token_ids, text_mask)

    def embed_text(self, text_states: Tensor) -> Tensor:
        """Project the [CLS] state -> text_embedding (R, E), unit norm."""
        self.require("text")
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
        self.require("pair")
        logits: Tensor = self.match_head(pair_states[:, 0])
        return logits

    def decode(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Predict every next token of known texts -> logits (R, L, V); rows as in `encode_pair`."""
        token_ids = with_first(token_ids, self.config.tokens.dec)
        return self.text.decode(token_ids, text_mask, context)

    def reconstruct(
        self, images: Tensor, visible: Tensor, text_states: Tensor, text_mask: Tensor
    ) -> Tensor:
        """Predict the normalised states of whole images from some patches and a text.

        images                  (B, 3, S, S)
        visible                 (B, K) numbers of the patches that may be seen
        text_states, text_mask  (B, L, width) of `encode_text`, (B, L)
        Returns                 (B, 1 + N, width), [CLS] first
        """
        self._require_reconstruction()
        visible_states = self.vision.encode_visible(images, visible)
        predicted: Tensor = self.reconstruction_head(
            visible_states, visible, text_states, text_mask
        )
        return predicted

    def refine_image(self, images: Tensor, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Move each image's embedding by a text -> image_embedding (B, E), unit norm.

        images                  (B, 3, S, S)
        token_ids, text_mask    (B, L) what is true of the image that is sought
        Patches are hidden in one way after another, and the [CLS] state is predicted from the
        others with the text and with an empty one. The embedding is made of the prediction on which
        the text has had most effect: there it tells of what is hidden.
        Raises ValueError if the model has no reconstruction head.
        """
        num_patches = self.config.vision.num_patches
        num_visible = self._require_reconstruction().num_visible(num_patches)
        class_states = self.encode_image(images)[:, :1]
        tokens = self.config.tokens
        empty = torch.tensor([[tokens.cls, tokens.sep]] * images.shape[0], device=images.device)
        texts = [
            (self.encode_text(ids, mask), mask)
            for ids, mask in ((token_ids, text_mask), (empty, torch.ones_like(empty)))
        ]
        refined, effects = [], []
        for visible in ways_to_see(num_patches, num_visible).to(images.device):
            rows = visible.expand(images.shape[0], -1)
            told, untold = (self.reconstruct(images, rows, *text)[:, :1] for text in texts)
            refined.append(told)
            effects.append((told - untold).square().mean(dim=2))
        best = torch.cat(effects, dim=1).argmax(dim=1)
        best_states = torch.cat(refined, dim=1)[torch.arange(len(best), device=best.device), best]
        # What normalising took away is taken from the image as it is.
        mean = class_states.mean(dim=2, keepdim=True)
        deviation = class_states.std(dim=2, keepdim=True, correction=0)
        return self.embed_image(mean + deviation * best_states[:, None])

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

    def _require_reconstruction(self) -> ReconstructionConfig:
        if self.config.reconstruction is None:
            raise ValueError(
                "this model has no reconstruction head: `openblip finetune reconstruction` gives "
                "it one, and so does pre-training with objective.reconstruction_weight above 0"
            )
        return self.config.reconstruction

    def require(self, role: Role) -> None:
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


@dataclass(frozen=True)
class TaskStart(Generic[T]):
    """A model of another task that starts from a BLIP's weights, the BLIP's tensors that it has no
    place for, and those of its own that start anew.
    """

    model: T
    left_out: tuple[str, ...]
    drawn: tuple[str, ...]

    def notes(self) -> list[str]:
        """Return sentences that name every tensor left out or drawn."""
        said = {"left out of its parts": self.left_out, "drawn anew": self.drawn}
        return [
            f"tensors {what} ({len(names)}): {', '.join(names)}"
            for what, names in said.items()
            if names
        ]
