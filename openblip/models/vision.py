"""The image encoder: a pre-norm Vision Transformer (BLIP sec. 3.1; Dosovitskiy et al. 2021).

Letters: B images, N patches, S image side in pixels, P patch side in pixels, D width, H heads.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image encoder; the defaults are the paper's ViT-B/16 at 224 px.

    image_size_px, patch_size_px  sides of the square image and of the square patch
    drop_path                     probability of skipping a residual branch in the last layer,
                                  growing linearly from 0 in the first
    init_std                      standard deviation of the initial weights; small models that start
                                  from nothing learn faster with more than the paper's 0.02
    position_init_std             the same of the position embeddings; a model from nothing tells
                                  left from right sooner when they weigh as much as the patches
    Raises ValueError for sizes that do not divide.
    """

    image_size_px: int = 224
    patch_size_px: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    drop_path: float = 0.0
    init_std: float = 0.02
    position_init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.image_size_px % self.patch_size_px:
            raise ValueError(
                f"image_size_px {self.image_size_px} is not a multiple of "
                f"patch_size_px {self.patch_size_px}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path {self.drop_path} must be in [0, 1)")

    @property
    def num_patches(self) -> int:
        return (self.image_size_px // self.patch_size_px) ** 2


class VisionLayer(nn.Module):
    """Self-attention and MLP, each behind a LayerNorm and added to what came in."""

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        width = config.width
        hidden = int(width * config.mlp_ratio)
        self.num_heads = config.num_heads
        self.drop_path = drop_path
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self._drop_path(self._attend(self.attention_norm(states)))
        mlp: Tensor = self.down(F.gelu(self.up(self.mlp_norm(states))))
        return states + self._drop_path(mlp)

    def class_state(self, states: Tensor) -> Tensor:
        """Return the first of `forward`'s states alone, (B, 1, D); for inference."""
        first = states[:, :1] + self._attend(self.attention_norm(states), num_queries=1)
        mlp: Tensor = self.down(F.gelu(self.up(self.mlp_norm(first))))
        return first + mlp

    def _attend(self, states: Tensor, num_queries: int | None = None) -> Tensor:
        batch, length, width = states.shape
        qkv = self.qkv(states).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query[:, :, :num_queries], key, value)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output

    def _drop_path(self, branch: Tensor) -> Tensor:
        """Zero the branch of a random share of the images (stochastic depth, Huang et al. 2016)."""
        if self.drop_path == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.drop_path
        mask = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep)
        return branch * mask / keep


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) to image_states (B, 1 + N, D), the image's own [CLS] state first."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        # A convolution with stride = kernel is one matrix product over flattened patches; the
        # weight keeps the convolution's shape.
        self.patch_weight = nn.Parameter(
            torch.empty(config.width, 3, config.patch_size_px, config.patch_size_px)
        )
        self.patch_bias = nn.Parameter(torch.zeros(config.width))
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.width))
        rates = [
            config.drop_path * i / max(1, config.num_layers - 1) for i in range(config.num_layers)
        ]
        self.layers = nn.ModuleList(VisionLayer(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images.

        images     (B, 3, S, S)
        Returns    (B, 1 + N, D)
        Raises ValueError if the side is not the configured one.
        """
        return self._encode(self._embed(images))

    def class_state(self, images: Tensor) -> Tensor:
        """Return the first of `forward`'s states alone, (B, 1, D); for inference."""
        states = self._embed(images)
        for layer in self.layers[:-1]:
            states = layer(states)
        normed: Tensor = self.norm(cast(VisionLayer, self.layers[-1]).class_state(states))
        return normed

    def encode_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encode some patches of each image as if it had no others.

        images     (B, 3, S, S)
        visible    (B, K) numbers of the patches
        Returns    (B, 1 + K, D)
        """
        states = self._embed(images)
        places = F.pad(visible + 1, (1, 0))[..., None].expand(-1, -1, states.shape[2])
        return self._encode(states.gather(1, places))

    def _embed(self, images: Tensor) -> Tensor:
        config = self.config
        batch, _, height, width = images.shape
        size, patch = config.image_size_px, config.patch_size_px
        if (height, width) != (size, size):
            raise ValueError(f"images are {height} x {width} px, the model takes {size} x {size}")
        grid = size // patch
        patches = images.view(batch, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, grid * grid, 3 * patch * patch)
        states = F.linear(patches, self.patch_weight.flatten(1), self.patch_bias)
        states = torch.cat([self.class_token.expand(batch, -1, -1), states], dim=1)
        return states + self.position_embedding

    def _encode(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        normed: Tensor = self.norm(states)
        return normed

    def _initialise(self) -> None:
        std = self.config.init_std
        nn.init.trunc_normal_(self.class_token, std=std)
        position_std = self.config.position_init_std
        bound = max(2.0, 2.0 * position_std)
        nn.init.trunc_normal_(self.position_embedding, std=position_std, a=-bound, b=bound)
        # No more than leaves the scale of the pixels as it is: large patches would drown the
        # positions. The paper's sizes stay at `init_std`.
        pixels = 3 * self.config.patch_size_px**2
        nn.init.trunc_normal_(self.patch_weight, std=min(std, pixels**-0.5))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)


def resize_position_embedding(position_embedding: Tensor, num_patches: int) -> Tensor:
    """Resize a square grid of position embeddings to another grid, keeping the [CLS] position.

    position_embedding  (1, 1 + N, D)
    num_patches         positions of the new grid, a square number
    Returns             (1, 1 + num_patches, D)
    Raises ValueError if either grid is not square.
    Source: BLIP `interpolate_pos_embed`: bicubic, corners not aligned, no antialiasing.
    """
    old_patches = position_embedding.shape[1] - 1
    if old_patches == num_patches:
        return position_embedding
    old_side, new_side = math.isqrt(old_patches), math.isqrt(num_patches)
    if old_side**2 != old_patches or new_side**2 != num_patches:
        raise ValueError(f"cannot resize {old_patches} positions to {num_patches}: not square")
    class_position, grid = position_embedding[:, :1], position_embedding[:, 1:]
    grid = grid.reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return torch.cat([class_position, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
