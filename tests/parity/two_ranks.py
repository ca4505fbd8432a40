"""Two processes of the official code under DistributedDataParallel, number by number.

Run by torchrun with the folder of the reference; `test_distributed.py` does so.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import RecordingArgmax, build, check_norms
from torch.testing import assert_close

from openblip.convert import from_official, official_config, official_names, to_official
from openblip.data.batches import ImageTextBatch
from openblip.losses import lm_loss
from openblip.models.blip import Blip
from openblip.training.alignment import Alignment
from openblip.training.distributed import joined, world
from openblip.training.loop import StepOutput, TrainingStep

SOFT_TARGET_WEIGHT = 0.4
RUNS = {
    "pretrain": ("pair", "momentum", "rank"),
    "retrieval_negative_all_rank_False": ("image", "online", "rank"),
    "retrieval_negative_all_rank_True": ("image", "online", "all_ranks"),
}


class Step(TrainingStep):
    """The losses of either task, with the reference's draws."""

    def __init__(self, blip: Blip, alignment: Alignment) -> None:
        super().__init__()
        self.blip, self.alignment = blip, alignment
        self.draw = RecordingArgmax()

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        image_states = self.blip.encode_image(batch.images)
        context = self.blip.project_context(image_states)
        aligned = self.alignment(
            self.blip, batch.images, image_states, context, batch.token_ids, batch.text_mask,
            batch.image_ids, batch.text_ids, SOFT_TARGET_WEIGHT, self.draw,
        )  # fmt: skip
        losses = {"itc": aligned.itc, "itm": aligned.itm}
        if "decode" in self.blip.config.text.roles:
            logits = self.blip.decode(batch.token_ids, batch.text_mask, context)
            losses["lm"] = lm_loss(logits, batch.token_ids, batch.text_mask)
        return StepOutput(sum(losses.values()), losses, (aligned.entries,))  # type: ignore[arg-type]

    def after_optimizer_step(self, output: StepOutput) -> None:
        self.alignment.after_optimizer_step(self.blip, list(output.entries))


def compare(reference: Path, name: str, rank: int) -> set[str]:
    """Take one step as one of two ranks; return what was compared with the reference."""
    positives, mining, negatives = RUNS[name]
    config = json.loads((reference / "config.json").read_text())
    roles = {"text", "pair"} | ({"decode"} if name == "pretrain" else set())
    blip = Blip(official_config(config).with_roles(frozenset(roles))).eval()
    names = official_names(blip.config)
    tensors = load_file(reference / "pretrain_init.safetensors")
    blip.load_state_dict(from_official(tensors, names))
    alignment = build(reference, blip, positives, mining, config["momentum"])
    alignment.config = replace(alignment.config, negatives=negatives)
    file = "pretrain_batches" if name == "pretrain" else "retrieval_io"
    batches = load_file(reference / f"{file}.safetensors")
    images = batches[f"step{rank}.images"]
    ids = batches.get(f"step{rank}.idx", torch.arange(len(images))).view(-1)
    batch = ImageTextBatch(
        images, batches[f"step{rank}.input_ids"], batches[f"step{rank}.attention_mask"], ids, ids
    )
    step = Step(blip, alignment)
    model = world().wrap(step)  # averages gradients for as long as it lives
    output = model(batch, 0)
    output.total.backward()
    step.after_optimizer_step(output)

    facts = json.loads((reference / "dist2.json").read_text())[name]
    wanted = facts[f"rank{rank}"]
    losses = [value.item() for value in output.measures.values()]
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)
    assert step.draw.drawn == [
        wanted["negative_image_index_per_text"],
        wanted["negative_text_index_per_image"],
    ]
    assert step.draw.weights[0].shape[1] == wanted["weight_vector_length"]
    gradients = to_official({k: p.grad for k, p in blip.named_parameters()}, names)
    check_norms(gradients, facts["grad_norms_after_ddp_mean"])
    ours = {f"grad.{key}": value for key, value in gradients.items()}
    ours |= {
        "image_queue": alignment.queue.image_embedding.T,
        "text_queue": alignment.queue.text_embedding.T,
        "idx_queue": alignment.queue.image_ids[None],
        "queue_ptr": alignment.queue.pointer[None],
        "ptr_queue": alignment.queue.pointer[None],
    }
    compared = set()
    for key, value in load_file(reference / "dist2_expected.safetensors").items():
        run, _, what = key.partition(".")
        if run == name:
            atol = 1e-4 if what.startswith("grad.") else 1e-5
            assert_close(ours[what].view_as(value), value, atol=atol, rtol=1e-5, msg=key)
            compared.add(what)
    return compared


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as ranks:
        assert ranks.size == 2
        for name in RUNS:
            compared = compare(Path(sys.argv[1]), name, ranks.rank)
            assert {"image_queue", "text_queue", "grad.temp"} < compared
            print(f"{name} equals on rank {ranks.rank}")
