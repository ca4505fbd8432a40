"""The peer of `train_step.py`: BLIP's pre-training step written after the paper's equations.

It stands on transformers' BLIP modules and does what one writes first: texts padded to the longest
that is allowed, ITM in two passes, its negatives drawn text by text, keys and values of the images
projected anew in every pass, a momentum average parameter by parameter, the default AdamW.

Letters: B pairs of the batch, Q queued pairs, E embedding width, L tokens.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from openblip.checkpoint import with_roles
from openblip.convert_transformers import ROLES_OF, config_to_transformers
from openblip.convert_weights import to_official, transformers_names
from openblip.data.batches import ImageTextBatch
from openblip.pretrain import PretrainStep

MINING_FLOOR = 1e-4


class PlainStep(nn.Module):
    """A pre-training step with the weights, the twin and the queue of one of openblip's.

    weight  of the twin's belief in the ITC targets
    """

    def __init__(self, ours: PretrainStep, weight: float) -> None:
        super().__init__()
        self.tokens, self.weight = ours.blip.config.tokens, weight
        self.momentum = ours.alignment.config.momentum
        retrieval = _converted(ours, BlipForImageTextRetrieval)
        self.vision = retrieval.vision_model
        self.text = retrieval.text_encoder
        self.image_projection, self.text_projection = retrieval.vision_proj, retrieval.text_proj
        self.match_head = retrieval.itm_head
        self.decoder = _converted(ours, BlipForConditionalGeneration).text_decoder
        bert = self.decoder.bert
        bert.embeddings = self.text.embeddings
        self.decoder.cls.predictions.decoder.weight = self.text.embeddings.word_embeddings.weight
        for mine, shared in zip(bert.encoder.layer, self.text.encoder.layer, strict=True):
            mine.crossattention = shared.crossattention
            mine.intermediate, mine.output = shared.intermediate, shared.output
        self.temperature = nn.Parameter(ours.blip.temperature.detach().clone())
        self.online = nn.ModuleList(
            [self.vision, self.text, self.image_projection, self.text_projection]
        )
        self.twin = copy.deepcopy(self.online).requires_grad_(False)
        queue = ours.alignment.queue
        self.register_buffer("image_queue", queue.image_embedding.clone())
        self.register_buffer("text_queue", queue.text_embedding.clone())
        self.pointer = 0

    def forward(self, batch: ImageTextBatch) -> list[Tensor]:
        """Return ITC, ITM and LM of a batch of whole length."""
        ids, mask = batch.token_ids, batch.text_mask
        image_states, image_embedding, text_embedding = self._embed(self.online, batch)
        with torch.no_grad():
            _, momentum_image, momentum_text = self._embed(self.twin, batch)
            all_images = torch.cat([momentum_image, self.image_queue])
            all_texts = torch.cat([momentum_text, self.text_queue])
            targets = torch.eye(len(ids), len(all_texts))
            beliefs = [momentum_image @ all_texts.T, momentum_text @ all_images.T]
            image_targets, text_targets = (
                self.weight * F.softmax(belief / self.temperature, dim=1)
                + (1 - self.weight) * targets
                for belief in beliefs
            )
        image_to_text = image_embedding @ all_texts.T / self.temperature
        text_to_image = text_embedding @ all_images.T / self.temperature
        itc = (
            -(F.log_softmax(image_to_text, dim=1) * image_targets).sum(dim=1).mean()
            - (F.log_softmax(text_to_image, dim=1) * text_targets).sum(dim=1).mean()
        ) / 2

        with torch.no_grad():
            size = len(ids)
            weights_of_texts = F.softmax(image_to_text[:, :size], dim=1) + MINING_FLOOR
            weights_of_images = F.softmax(text_to_image[:, :size], dim=1) + MINING_FLOOR
            weights_of_texts.fill_diagonal_(0)
            weights_of_images.fill_diagonal_(0)
        wrong_images, wrong_ids, wrong_masks = [], [], []
        for i in range(size):
            wrong_images.append(image_states[torch.multinomial(weights_of_images[i], 1).item()])
        for i in range(size):
            place = torch.multinomial(weights_of_texts[i], 1).item()
            wrong_ids.append(ids[place])
            wrong_masks.append(mask[place])
        pair_ids = ids.clone()
        pair_ids[:, 0] = self.tokens.enc
        true = self._pair(pair_ids, mask, image_states)
        wrong_ids = torch.cat([pair_ids, torch.stack(wrong_ids)])
        wrong_ids[:, 0] = self.tokens.enc
        wrong = self._pair(
            wrong_ids,
            torch.cat([mask, torch.stack(wrong_masks)]),
            torch.cat([torch.stack(wrong_images), image_states]),
        )
        labels = torch.cat([torch.ones(size), torch.zeros(2 * size)]).long()
        itm = F.cross_entropy(self.match_head(torch.cat([true, wrong])), labels)

        given = ids.clone()
        given[:, 0] = self.tokens.dec
        logits = self.decoder(
            given, attention_mask=mask, encoder_hidden_states=image_states, use_cache=False
        ).logits
        following = given.masked_fill(mask == 0, -100)[:, 1:]
        lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), label_smoothing=0.1)
        self.waiting = (momentum_image, momentum_text)
        return [itc, itm, lm]

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Fill the queue, clamp the temperature, move the twin, one parameter after the other."""
        image_embedding, text_embedding = self.waiting
        end = self.pointer + len(image_embedding)
        assert end <= len(self.image_queue), "as in the original, batches divide the queue"
        self.image_queue[self.pointer : end] = image_embedding
        self.text_queue[self.pointer : end] = text_embedding
        self.pointer = end % len(self.image_queue)
        self.temperature.clamp_(0.001, 0.5)
        for mine, online in zip(self.twin.parameters(), self.online.parameters(), strict=True):
            mine.data = mine.data * self.momentum + online.data * (1.0 - self.momentum)

    def _embed(self, modules: nn.ModuleList, batch: ImageTextBatch) -> tuple[Tensor, ...]:
        vision, text, image_projection, text_projection = modules
        image_states = vision(batch.images).last_hidden_state
        text_states = text(batch.token_ids, attention_mask=batch.text_mask).last_hidden_state
        return (
            image_states,
            F.normalize(image_projection(image_states[:, 0]), dim=-1),
            F.normalize(text_projection(text_states[:, 0]), dim=-1),
        )

    def _pair(self, ids: Tensor, mask: Tensor, image_states: Tensor) -> Tensor:
        states = self.text(ids, attention_mask=mask, encoder_hidden_states=image_states)
        first: Tensor = states.last_hidden_state[:, 0]
        return first


def _converted(ours: PretrainStep, kind: type[nn.Module]) -> nn.Module:
    """Return a model of transformers with the weights of ours."""
    part = with_roles(ours.blip, ROLES_OF[kind.__name__])
    values = config_to_transformers(part.config, kind.__name__, None)
    model = kind(BlipConfig(**{k: v for k, v in values.items() if k.endswith(("config", "size"))}))
    tensors = to_official(part.state_dict(), transformers_names(part.config))
    absent, extra = model.load_state_dict(tensors, strict=False)
    # What is tied, and the ids of positions.
    absent = [n for n in absent if "predictions.decoder" not in n and "position_ids" not in n]
    assert not [*absent, *extra], (absent, extra)
    return model
