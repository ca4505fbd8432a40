"""The same work by transformers, as its documentation would have it and no slower.

The image is encoded once and its states are expanded to the texts, which are padded to the longest.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.bench import (
    NEW_TOKENS,
    NUM_LOOPED,
    PROMPT,
    Run,
    decoding_of,
    random_images,
    random_texts,
)
from openblip.checkpoint import save_checkpoint
from openblip.convert import convert_to_transformers
from openblip.convert_transformers import Architecture
from openblip.generation import generate
from openblip.inference import Engine
from openblip.models.blip import Blip
from openblip.tokenizer import TokenBatch, Tokenizer

TOLERANCE = 1e-3
"""By which float32 logits and embeddings of both sides may differ before a time is taken."""


class Peer:
    """A captioner and a filter of transformers with the weights of a `Blip`."""

    def __init__(self, blip: Blip, tokenizer: Tokenizer) -> None:
        """Convert the weights. Raises ValueError if transformers is not installed."""
        try:
            from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval
        except ImportError as error:
            raise ValueError("--against transformers needs it: pip install transformers") from error
        with tempfile.TemporaryDirectory() as folder:
            ours = Path(folder, "ours")
            save_checkpoint(ours, blip, tokenizer, "Random weights.")
            models: list[Any] = []
            kinds: dict[Architecture, Any] = {
                "BlipForConditionalGeneration": BlipForConditionalGeneration,
                "BlipForImageTextRetrieval": BlipForImageTextRetrieval,
            }
            for name, kind in kinds.items():
                convert_to_transformers(ours, Path(folder, name), architecture=name)
                models.append(kind.from_pretrained(Path(folder, name)).eval())
        self.captioner, self.judge = models
        self.size_px = blip.config.vision.image_size_px
        self.tokens = blip.config.tokens
        self.prompt_ids = tokenizer.encode(PROMPT)[1:]
        self.texts, self.pairs = random_texts(tokenizer), random_texts(tokenizer, 16)

    def to(self, dtype: torch.dtype) -> None:
        """Turn both models into another precision."""
        self.captioner.to(dtype)
        self.judge.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.captioner.dtype
        return found

    @torch.no_grad()
    def caption(self, images: Tensor, num_beams: int) -> list[list[int]]:
        """Return the new tokens of NEW_TOKENS long captions."""
        given = torch.tensor([[self.tokens.dec, *self.prompt_ids]]).repeat(len(images), 1)
        ids = self.captioner.generate(
            images.to(self.dtype), given, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
            num_beams=num_beams, do_sample=False,
        )  # fmt: skip
        new: list[list[int]] = ids[:, given.shape[1] - 1 :].tolist()
        return new

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return image states (B, 1 + N, D) of the filter's encoder."""
        states: Tensor = self.judge.vision_model(images.to(self.dtype))[0]
        return states

    @torch.no_grad()
    def match_logits(self, states: Tensor, texts: TokenBatch) -> Tensor:
        """Judge R texts beside the states (R, 1 + N, D) -> (R, 2); [ENC] first, as BLIP has it."""
        ids = texts.token_ids.clone()
        ids[:, 0] = self.tokens.enc
        pair_states = self.judge.text_encoder(
            input_ids=ids,
            attention_mask=texts.text_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        ).last_hidden_state
        logits: Tensor = self.judge.itm_head(pair_states[:, 0])
        return logits

    @torch.no_grad()
    def embed_texts(self, texts: TokenBatch) -> Tensor:
        """Embed texts -> (R, E), unit norm."""
        states = self.judge.text_encoder(
            input_ids=texts.token_ids, attention_mask=texts.text_mask
        ).last_hidden_state
        return torch.nn.functional.normalize(self.judge.text_proj(states[:, 0]), dim=-1)

    @torch.no_grad()
    def match_by_rows(self, image: Tensor, num_pairs: int) -> Tensor:
        """Judge pairs as the usual loop does: `forward` encodes the image anew for every text."""
        ids, mask = self.texts.token_ids[:num_pairs], self.texts.text_mask[:num_pairs]
        pixels = image.expand(num_pairs, -1, -1, -1).to(self.dtype)
        logits: Tensor = self.judge(ids, pixels, attention_mask=mask)[0]
        return logits

    def works(self) -> Mapping[str, Run]:
        """Return the work by the names of `bench.works`."""
        images = random_images(8, self.size_px)
        states = self.encode(images[:1])
        many = len(self.texts.token_ids)

        def capfilt() -> None:
            self.caption(images, 1)
            self.match_logits(self.encode(images).repeat_interleave(2, dim=0), self.pairs)

        def match(found: Tensor) -> Tensor:
            return self.match_logits(found.expand(many, -1, -1), self.texts)

        return {
            "image encoder, batch 8": lambda: self.encode(images),
            "caption, batch 1, greedy": lambda: self.caption(images[:1], 1),
            "caption, batch 1, beam 3": lambda: self.caption(images[:1], 3),
            "caption, batch 8, greedy": lambda: self.caption(images, 1),
            "caption, batch 8, beam 3": lambda: self.caption(images, 3),
            "ITM, 1 image x 128 texts, image to encode": lambda: match(self.encode(images[:1])),
            "ITM, 1 image x 128 texts, states at hand": lambda: match(states),
            "ITM, 1 image x 8 texts, encoded again for every text": lambda: self.match_by_rows(
                images[:1], NUM_LOOPED
            ),
            "ITC, 128 texts": lambda: self.embed_texts(self.texts),
            "CapFilt, batch 8, an image encoder each": capfilt,
            "CapFilt, batch 8, one image encoder": capfilt,
        }


def check_equal(engine: Engine, peer: Peer) -> None:
    """Make sure that both sides do the same work.

    Raises ValueError naming what differs: greedy tokens, beams, match logits or text embeddings.
    """
    images = random_images(2, peer.size_px)
    encoded = engine.encode(images)
    for num_beams in (1, 3):
        written = generate(
            engine.backend, encoded.context, prompt_ids=peer.prompt_ids[:-1],
            tokens=engine.tokenizer.special, decoding=decoding_of(num_beams), seeds=[0, 0],
        )  # fmt: skip
        ours = [list(one.token_ids) for [one] in written]
        if ours != peer.caption(images, num_beams):
            raise ValueError(f"captions of {num_beams} beams differ from transformers'")
    states = peer.encode(images[:1]).expand(len(peer.texts.token_ids), -1, -1)
    for name, own, other in (
        (
            "match logits",
            engine.match_tokens(encoded[:1], peer.texts),
            peer.match_logits(states, peer.texts)[:, 1],
        ),
        ("text embeddings", engine.embed_texts(peer.texts), peer.embed_texts(peer.texts)),
    ):
        difference = float((own - other).abs().max())
        if difference > TOLERANCE:
            raise ValueError(f"{name} differ from transformers' by {difference:.2g}")
