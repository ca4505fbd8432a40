"""MED, the multimodal mixture of encoder and decoder: one BERT with three roles (BLIP sec. 3.1).

| role   | self-attention | cross-attention | what it is                    |
|--------|----------------|-----------------|-------------------------------|
| text   | bidirectional  | no              | text encoder                  |
| pair   | bidirectional  | yes             | image-grounded text encoder   |
| decode | causal         | yes             | image-grounded text decoder   |

What the roles share appears once: embeddings, cross-attention and feed-forward. Each kind of
self-attention has weights of its own, with its own output projection and LayerNorm.

Letters: B images, R rows of text (a multiple of B where images are given), L tokens, D text width,
H heads, N image positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.models.context import Context, DecoderCache

Role = Literal["text", "pair", "decode"]
ALL_ROLES: frozenset[Role] = frozenset({"text", "pair", "decode"})


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the five tokens that the model itself must know."""

    pad: int
    cls: int
    sep: int
    dec: int
    enc: int


@dataclass(frozen=True)
class MedConfig:
    """Sizes of the MED and the roles that it plays; the defaults are the paper's, base size.

    vocab_size     with [DEC] and [ENC]
    context_width  width of the image states that the cross-attention reads
    init_std       standard deviation of the initial weights
    roles          parts that exist; calling an absent one raises
    Raises ValueError for heads that do not divide the width, and for no or unknown roles.
    """

    vocab_size: int = 30524
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    max_positions: int = 512
    context_width: int = 768
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    init_std: float = 0.02
    roles: frozenset[Role] = ALL_ROLES

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not self.roles or not self.roles <= ALL_ROLES:
            raise ValueError(
                f"roles {sorted(self.roles)}: expected some of {', '.join(sorted(ALL_ROLES))}"
            )

    @property
    def has_bidirectional(self) -> bool:
        return bool(self.roles & {"text", "pair"})

    @property
    def has_cross(self) -> bool:
        return bool(self.roles & {"pair", "decode"})


class AttentionOutput(nn.Module):
    """Projection of what was attended to, dropout, residual, LayerNorm (BERT is post-norm)."""

    def __init__(self, config: MedConfig, in_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, attended: Tensor, states: Tensor) -> Tensor:
        projected = F.dropout(self.linear(attended), self.dropout, self.training)
        normed: Tensor = self.norm(projected + states)
        return normed


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection and LayerNorm."""

    def __init__(self, config: MedConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = AttentionOutput(config, config.width)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (R, H, L, D / H)."""
        rows, length, width = states.shape
        qkv = self.qkv(states).view(rows, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return query, key, value

    def attend(
        self, states: Tensor, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None
    ) -> Tensor:
        """Attend and add to `states`. visible (R or 1, 1, L or 1, T) bool; None: all is visible."""
        attended = F.scaled_dot_product_attention(
            query, key, value, visible, self.dropout if self.training else 0.0
        )
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2), states)
        return output


class ImageAttention(nn.Module):
    """Attention of text to image states, whose keys and values come from a `Context`."""

    def __init__(self, config: MedConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.context_width, 2 * config.width)

    def project_context(self, image_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (B, H, N, D / H), of image_states (B, N, context width)."""
        images, positions, _ = image_states.shape
        key_value = self.key_value(image_states).view(images, positions, 2, self.num_heads, -1)
        key, value = key_value.permute(2, 0, 3, 1, 4)
        return key, value

    def attend(self, states: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """Return what the states (R, L, D) find in the images, of the same shape.

        visible  (B, 1, 1, N) bool, the positions that are no padding; None: all
        """
        rows, length, width = states.shape
        images = key.shape[0]
        # The R / B rows of one image become one longer row of queries: the image's keys and
        # values are read once for all of them, and never copied.
        query = self.query(states).view(images, -1, self.num_heads, width // self.num_heads)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, visible, self.dropout if self.training else 0.0
        )
        return attended.transpose(1, 2).reshape(rows, length, width)


class CrossAttention(ImageAttention):
    """The same with its output projection and LayerNorm."""

    def __init__(self, config: MedConfig) -> None:
        super().__init__(config)
        self.output = AttentionOutput(config, config.width)

    def forward(self, states: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        output: Tensor = self.output(self.attend(states, key, value, visible), states)
        return output


class AnyCrossAttention(Protocol):
    """What a layer asks of its cross-attention."""

    def project_context(self, image_states: Tensor) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self, states: Tensor, key: Tensor, value: Tensor, visible: Tensor | None
    ) -> Tensor: ...


CrossBuilder = Callable[[MedConfig, int], nn.Module]
"""From the configuration and a layer's number to an `AnyCrossAttention`."""
_ONE_IMAGE: CrossBuilder = lambda config, layer: CrossAttention(config)  # noqa: E731


class MedLayer(nn.Module):
    """One layer: the self-attentions that the roles need, one cross-attention, one feed-forward."""

    def __init__(self, config: MedConfig, layer: int, build_cross: CrossBuilder) -> None:
        super().__init__()
        self.bidirectional = SelfAttention(config) if config.has_bidirectional else None
        self.causal = SelfAttention(config) if "decode" in config.roles else None
        self.cross = build_cross(config, layer) if config.has_cross else None
        self.up = nn.Linear(config.width, config.ffn_width)
        self.down = AttentionOutput(config, config.ffn_width)

    def feed_forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(states)), states)
        return output

    def cross_and_feed(
        self, states: Tensor, key: Tensor, value: Tensor, visible: Tensor | None
    ) -> Tensor:
        assert self.cross is not None
        return self.feed_forward(self.cross(states, key, value, visible))


class LmHead(nn.Module):
    """States to vocabulary logits; the matrix is the word embedding, given by the caller."""

    def __init__(self, config: MedConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embedding: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.linear(states))), word_embedding, self.bias)


class Med(nn.Module):
    """The transformer of `MedConfig`, one method per role. First tokens are the caller's to set.

    build_cross  what a layer looks at images with; NLVR2 looks at two
    """

    def __init__(self, config: MedConfig, build_cross: CrossBuilder = _ONE_IMAGE) -> None:
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_positions, config.width)
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            MedLayer(config, layer, build_cross) for layer in range(config.num_layers)
        )
        self.lm_head = LmHead(config) if "decode" in config.roles else None
        self._initialise()

    def encode_text(self, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Encode text alone. token_ids, text_mask (R, L) -> text_states (R, L, D)."""
        self._require("text")
        return self._encode(token_ids, text_mask, None)

    def encode_pair(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Encode text in sight of images. token_ids, text_mask (R, L) -> pair_states (R, L, D).

        Rows i * R / B to (i + 1) * R / B - 1 see image i of the context.
        """
        self._require("pair")
        self._check_rows(token_ids, context)
        return self._encode(token_ids, text_mask, context)

    def decode(self, token_ids: Tensor, text_mask: Tensor, context: Context) -> Tensor:
        """Predict every next token. token_ids, text_mask (R, L) -> logits (R, L, V).

        Position t sees tokens 0..t alone. Rows are grouped by image as in `encode_pair`.
        """
        self._require("decode")
        self._check_rows(token_ids, context)
        length = token_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=token_ids.device).tril()
        visible = causal & text_mask.bool()[:, None, None, :]
        # A row never attends to nothing, even where its own token is padding.
        visible = visible | torch.eye(length, dtype=torch.bool, device=token_ids.device)
        states = self._embed(token_ids, 0)
        for layer, key, value in self._layers_with(context):
            assert layer.causal is not None
            states = layer.causal.attend(states, *layer.causal.project(states), visible)
            states = layer.cross_and_feed(states, key, value, context.visible)
        return self._lm_logits(states)

    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor:
        """Append tokens to the cache and predict what follows the last of them.

        token_ids   (R, T) the newest T tokens, no padding among them
        cache       of the tokens before; grows by T
        Returns     (R, V) logits
        """
        self._require("decode")
        self._check_rows(token_ids, context)
        num_new, start = token_ids.shape[1], cache.num_tokens
        visible = None
        if num_new > 1:
            everything = torch.ones(
                num_new, start + num_new, dtype=torch.bool, device=token_ids.device
            )
            visible = everything.tril(start)
        states = self._embed(token_ids, start)
        for index, (layer, key, value) in enumerate(self._layers_with(context)):
            assert layer.causal is not None
            query, new_key, new_value = layer.causal.project(states)
            keys, values = cache.append(index, new_key, new_value)
            states = layer.causal.attend(states, query, keys, values, visible)
            states = layer.cross_and_feed(states, key, value, context.visible)
        return self._lm_logits(states[:, -1])

    def project_context(self, image_states: Tensor) -> Context:
        """Project image_states (B, N, context width) to every layer's keys and values."""
        if not self.config.has_cross:
            raise ValueError("this model has neither the role 'pair' nor 'decode'")
        pairs = [
            cast(AnyCrossAttention, cast(MedLayer, layer).cross).project_context(image_states)
            for layer in self.layers
        ]
        return Context(tuple(key for key, _ in pairs), tuple(value for _, value in pairs))

    def _encode(self, token_ids: Tensor, text_mask: Tensor, context: Context | None) -> Tensor:
        visible = text_mask.bool()[:, None, None, :]
        states = self._embed(token_ids, 0)
        for index in range(len(self.layers)):
            layer = cast(MedLayer, self.layers[index])
            assert layer.bidirectional is not None
            states = layer.bidirectional.attend(
                states, *layer.bidirectional.project(states), visible
            )
            if context is None:
                states = layer.feed_forward(states)
            else:
                states = layer.cross_and_feed(
                    states, context.keys[index], context.values[index], context.visible
                )
        return states

    def _embed(self, token_ids: Tensor, start: int) -> Tensor:
        length = token_ids.shape[1]
        if start + length > self.config.max_positions:
            raise ValueError(
                f"{start + length} tokens, the model has {self.config.max_positions} positions"
            )
        positions = self.position_embedding.weight[start : start + length]
        embedded = self.embedding_norm(self.word_embedding(token_ids) + positions)
        return F.dropout(embedded, self.config.dropout, self.training)

    def _lm_logits(self, states: Tensor) -> Tensor:
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(states, self.word_embedding.weight)
        return logits

    def _layers_with(self, context: Context) -> Sequence[tuple[MedLayer, Tensor, Tensor]]:
        layers = [cast(MedLayer, layer) for layer in self.layers]
        return list(zip(layers, context.keys, context.values, strict=True))

    def _require(self, role: Role) -> None:
        if role not in self.config.roles:
            raise ValueError(
                f"this model has no role {role!r}; it has: {', '.join(sorted(self.config.roles))}"
            )

    def _check_rows(self, token_ids: Tensor, context: Context) -> None:
        if token_ids.shape[0] % context.num_images:
            raise ValueError(
                f"{token_ids.shape[0]} rows of text are not a multiple of "
                f"{context.num_images} images"
            )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.init_std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
