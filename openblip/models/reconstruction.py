"""Text-guided reconstruction: what is hidden of an image, predicted from the rest and a text.

Some patches are hidden from the image encoder. From the states of the others and the text states,
a small head predicts the states that the momentum image encoder has at all places, since it sees
the whole image; [CLS], which tells of every patch, is always predicted. States are predicted
normalised: every place has mean 0 and variance 1 over its channels.

Letters: B images, N patches, K visible patches, D image width, L tokens, T text width, H heads.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.models.vision import VisionConfig

MAX_WAYS_TO_HIDE = 16
"""Sets of hidden patches that a refinement tries."""


@dataclass(frozen=True)
class ReconstructionConfig:
    """Size of the head, and the share of an image's patches that is hidden from it.

    At least one patch is hidden, and at least one is not.
    Raises ValueError for a share that is not between 0 and 1, and for no layer.
    """

    num_layers: int = 2
    hidden_share: float = 0.5

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers {self.num_layers} must be at least 1")
        if not 0.0 < self.hidden_share < 1.0:
            raise ValueError(f"hidden_share {self.hidden_share} must be between 0 and 1")

    def num_visible(self, num_patches: int) -> int:
        """Return K of N patches. Raises ValueError for a single patch."""
        if num_patches < 2:
            raise ValueError("an image of one patch leaves nothing to predict its patch from")
        return min(max(1, num_patches - round(self.hidden_share * num_patches)), num_patches - 1)


class ReconstructionLayer(nn.Module):
    """The places look at one another and at the text; then an MLP. Pre-norm, as the ViT is."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        width, hidden = vision.width, int(vision.width * vision.mlp_ratio)
        self.num_heads = vision.num_heads
        self.attention_norm = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, states: Tensor, text: Tensor, is_seen: Tensor) -> Tensor:
        """Update states (B, 1+N, D) by themselves and text (B, L, D).

        is_seen  (B, 1, 1, 1+N+L) bool, False for padding
        """
        batch, places, width = states.shape
        normed = self.attention_norm(states)
        query = self.query(normed).view(batch, places, self.num_heads, -1).transpose(1, 2)
        key_value = self.key_value(torch.cat([normed, text], dim=1))
        key_value = key_value.view(batch, -1, 2, self.num_heads, width // self.num_heads)
        key, value = key_value.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_seen)
        states = states + self.output(attended.transpose(1, 2).flatten(2))
        output: Tensor = states + self.down(F.gelu(self.up(self.mlp_norm(states))))
        return output


class ReconstructionHead(nn.Module):
    """Visible states and text states to the normalised states of all places."""

    def __init__(self, config: ReconstructionConfig, vision: VisionConfig, text_width: int) -> None:
        super().__init__()
        config.num_visible(vision.num_patches)
        self.text_projection = nn.Linear(text_width, vision.width)
        self.text_norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + vision.num_patches, vision.width))
        self.layers = nn.ModuleList(ReconstructionLayer(vision) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.output = nn.Linear(vision.width, vision.width)
        # As large as the states that it is added to; it is all that a hidden place starts from.
        nn.init.normal_(self.position_embedding)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=vision.init_std)
                nn.init.zeros_(module.bias)

    def forward(
        self, visible_states: Tensor, visible: Tensor, text_states: Tensor, text_mask: Tensor
    ) -> Tensor:
        """Predict all places.

        visible_states  (B, 1+K, D) of an image encoder that saw these patches alone, [CLS] first
        visible         (B, K) numbers of the patches
        text_states     (B, L, T)
        text_mask       (B, L) 1 = real token
        Returns         (B, 1+N, D), [CLS] first
        """
        batch, width = visible_states.shape[0], visible_states.shape[2]
        places = F.pad(visible + 1, (1, 0))[..., None].expand(-1, -1, width)
        states = self.position_embedding.to(visible_states.dtype).expand(batch, -1, -1)
        states = states.scatter_add(1, places, visible_states)
        text = self.text_norm(self.text_projection(text_states))
        is_seen = F.pad(text_mask.bool(), (states.shape[1], 0), value=True)[:, None, None, :]
        for layer in self.layers:
            states = layer(states, text, is_seen)
        predicted: Tensor = self.output(self.norm(states))
        return predicted


def draw_visible(
    num_images: int, num_patches: int, num_visible: int, device: torch.device
) -> Tensor:
    """Draw the patches that stay visible -> (B, K), each image its own, in rising order.

    From torch's global random state on the device, which a training saves.
    """
    order = torch.rand(num_images, num_patches, device=device).argsort(dim=1)
    return order[:, :num_visible].sort(dim=1).values


def is_hidden(visible: Tensor, num_patches: int) -> Tensor:
    """Return (B, 1+N) bool: which places are to be predicted; [CLS] always is."""
    hidden = torch.ones(visible.shape[0], 1 + num_patches, dtype=torch.bool, device=visible.device)
    return hidden.scatter(1, visible + 1, False)


def ways_to_see(num_patches: int, num_visible: int) -> Tensor:
    """Return sets of visible patches (W, K): all that there are, or else some, always the same."""
    if math.comb(num_patches, num_visible) <= MAX_WAYS_TO_HIDE:
        return torch.tensor(list(itertools.combinations(range(num_patches), num_visible)))
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(MAX_WAYS_TO_HIDE, num_patches, generator=generator).argsort(dim=1)
    return order[:, :num_visible].sort(dim=1).values
