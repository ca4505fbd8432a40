"""Three pre-training steps of the official code, number by number."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from openblip.convert import from_official, official_names, to_official
from openblip.convert_weights import tied_names
from openblip.losses import itc_loss, itm_loss, lm_loss, soft_targets
from openblip.models.blip import Blip
from openblip.training.alignment import Alignment, AlignmentConfig
from openblip.training.momentum import FeatureQueue, MomentumTwin, QueueEntries


def argmax(weights: Tensor) -> Tensor:
    return weights.argmax(dim=1)


def load_twin(twin: MomentumTwin, blip: Blip, tensors: dict[str, Tensor]) -> None:
    """Give the twin the reference's momentum weights, which start beside the online ones."""
    names = momentum_names(twin, blip)
    twin.load_state_dict(from_official(tensors, names))


def momentum_names(twin: MomentumTwin, blip: Blip) -> dict[str, list[str]]:
    config = blip.config.with_roles(frozenset({"text"}))
    ours = {name for name, _ in twin.named_parameters()}
    renamed = {
        "visual_encoder": "visual_encoder_m",
        "text_encoder": "text_encoder_m",
        "vision_proj": "vision_proj_m",
        "text_proj": "text_proj_m",
    }
    names = {}
    for name, parts in official_names(config).items():
        if name in ours:
            heads = [part.split(".", 1) for part in parts]
            names[name] = [f"{renamed[head]}.{rest}" for head, rest in heads]
    return names


def build(reference: Path, blip: Blip, positives: str, mining: str, momentum: float) -> Alignment:
    tensors = load_file(reference / "pretrain_init.safetensors")
    config = AlignmentConfig(
        positives=positives,
        mining=mining,
        queue_size=tensors["image_queue"].shape[1],
        momentum=momentum,
    )
    alignment = Alignment(blip, config)
    load_twin(alignment.twin, blip, tensors)
    alignment.queue.image_embedding.copy_(tensors["image_queue"].T)
    alignment.queue.text_embedding.copy_(tensors["text_queue"].T)
    blip.clamp_temperature()
    alignment.twin.update(blip)
    return alignment


def test_three_steps(reference: Path, official_blip, reference_config) -> None:
    blip = official_blip()
    alignment = build(reference, blip, "pair", "momentum", reference_config["momentum"])
    batches = load_file(reference / "pretrain_batches.safetensors")
    expected = load_file(reference / "pretrain_expected.safetensors")
    facts = json.loads((reference / "pretrain.json").read_text())
    names = official_names(blip.config)
    optimizer = torch.optim.AdamW(
        blip.parameters(),
        lr=facts["optimizer"]["lr"],
        weight_decay=facts["optimizer"]["weight_decay"],
    )
    num_compared = 0
    for index, step in enumerate(facts["steps"]):
        images = batches[f"step{index}.images"]
        token_ids = batches[f"step{index}.input_ids"]
        text_mask = batches[f"step{index}.attention_mask"]
        ids = torch.arange(images.shape[0]) + 1000 * index
        image_states = blip.encode_image(images)
        context = blip.project_context(image_states)
        output = alignment(
            blip, images, image_states, context, token_ids, text_mask, ids, ids,
            step["alpha"], argmax,
        )  # fmt: skip
        logits = blip.decode(token_ids, text_mask, context)
        lm = lm_loss(logits, token_ids, text_mask)
        for name, value in (("ita", output.itc), ("itm", output.itm), ("lm", lm)):
            assert value.item() == pytest.approx(step[f"loss_{name}"], rel=1e-5), (index, name)
        optimizer.zero_grad()
        (output.itc + output.itm + lm).backward()
        if index == 0:
            assert_close(image_states, expected["step0.local.image_embeds"], atol=1e-5, rtol=1e-5)
            entries = output.entries
            assert_close(
                entries.image_embedding, expected["step0.local.image_feat_m"], atol=1e-5, rtol=0
            )
            assert_close(
                entries.text_embedding, expected["step0.local.text_feat_m"], atol=1e-5, rtol=0
            )
            assert_close(
                output.match_logits, expected["step0.local.vl_output"], atol=1e-5, rtol=1e-5
            )
            real = text_mask.bool()
            # The reference is itself 1.3e-5 from its float64 value here: post-norm LayerNorms
            # and the unscaled word embedding amplify rounding.
            assert_close(logits[real], expected["step0.lm_logits"][real], atol=5e-5, rtol=1e-5)
            gradients = to_official({k: p.grad for k, p in blip.named_parameters()}, names)
            reached = {
                k.removeprefix("step0.grad.") for k in expected if k.startswith("step0.grad.")
            }
            for name in reached & set(gradients):
                assert_close(
                    gradients[name], expected[f"step0.grad.{name}"].view_as(gradients[name]),
                    atol=1e-4, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}",
                )  # fmt: skip
                num_compared += 1
            ours_only = set(gradients) - reached
            assert not ours_only, ours_only
            tied = {name for group in facts["tied_parameter_groups"] for name in _flat(group)}
            assert reached - set(gradients) <= tied, reached - set(gradients) - tied
        optimizer.step()
        if index == 0:
            parameters = to_official(dict(blip.named_parameters()), names)
            for key in expected:
                name = key.removeprefix("step0.after_adamw.")
                if key == name or name not in parameters:
                    continue
                moved = expected[f"step0.grad.{name}"].abs() > 1e-5
                moved = moved.view_as(parameters[name])
                assert_close(
                    parameters[name][moved],
                    expected[key].view_as(parameters[name])[moved], atol=1e-6, rtol=1e-5,
                )  # fmt: skip
        if index == len(facts["steps"]) - 1:
            # The expected twin is that of this step's forward, before this step's update.
            twin = to_official(
                dict(alignment.twin.named_parameters()), momentum_names(alignment.twin, blip)
            )
            moments = {k: v for k, v in expected.items() if k.startswith(f"step{index}.momentum.")}
            assert moments
            for key, value in moments.items():
                name = key.removeprefix(f"step{index}.momentum.")
                if "crossattention" in name:
                    continue  # the original's twin carries it and never uses it
                # Where the gradient is rounding noise (key biases), AdamW turns it into +-lr.
                gradient = expected[f"step0.grad.{name.replace('_m.', '.', 1)}"].view_as(value)
                moved = gradient.abs() > 1e-5
                assert_close(twin[name][moved], value[moved], atol=2e-5, rtol=1e-5)
        alignment.after_optimizer_step(blip, [output.entries])
        for kind, queue in (
            ("image", alignment.queue.image_embedding),
            ("text", alignment.queue.text_embedding),
        ):
            assert_close(queue.T, expected[f"step{index}.{kind}_queue"], atol=1e-5, rtol=0)
        assert alignment.queue.pointer == expected[f"step{index}.queue_ptr"].item()
    assert num_compared > 100


def _flat(group: object) -> list[str]:
    if isinstance(group, str):
        return [group]
    return [name for item in group for name in _flat(item)]


def test_batch_of_two_with_real_draws_and_clamped_temperature(
    reference: Path, official_blip, reference_config
) -> None:
    facts = json.loads((reference / "pretrain.json").read_text())["batch2"]
    batches = load_file(reference / "pretrain_batches.safetensors")
    for run in facts["runs"]:
        blip = official_blip()
        with torch.no_grad():
            blip.temperature.fill_(run["temp_set"])
        alignment = build(reference, blip, "pair", "momentum", reference_config["momentum"])
        assert blip.temperature.item() == pytest.approx(run["temp_after_forward"], rel=1e-6)
        images = batches["batch2.images"]
        token_ids, text_mask = batches["batch2.input_ids"], batches["batch2.attention_mask"]
        ids = torch.arange(images.shape[0])
        image_states = blip.encode_image(images)
        context = blip.project_context(image_states)
        output = alignment(
            blip, images, image_states, context, token_ids, text_mask, ids, ids, facts["alpha"]
        )
        lm = lm_loss(blip.decode(token_ids, text_mask, context), token_ids, text_mask)
        for name, value in (("ita", output.itc), ("itm", output.itm), ("lm", lm)):
            assert value.item() == pytest.approx(run[f"loss_{name}"], rel=1e-5), (run, name)


class RecordingArgmax:
    """Draw as the reference did, and remember what was drawn from: images first, then texts."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(self, weights: Tensor) -> Tensor:
        self.weights.append(weights)
        return argmax(weights)

    @property
    def drawn(self) -> list[list[int]]:
        return [argmax(weights).tolist() for weights in self.weights]


def check_norms(tensors: dict[str, Tensor], norms: dict[str, float], lr: float = 0.0) -> None:
    """Compare L2 norms, which the reference rounds to six digits.

    Key biases have no gradient but rounding noise, which AdamW turns into +-lr a step.
    """
    assert norms.keys() >= tensors.keys()
    for name, tensor in tensors.items():
        noise = lr * tensor.numel() ** 0.5 if name.endswith(("key.bias", "qkv.bias")) else 0.0
        wanted = pytest.approx(norms[name], rel=1e-4, abs=1e-4 + noise)
        assert tensor.norm().item() == wanted, name


def test_norms_draws_and_temperature_of_every_step(
    reference: Path, official_blip, reference_config
) -> None:
    blip = official_blip()
    alignment = build(reference, blip, "pair", "momentum", reference_config["momentum"])
    batches = load_file(reference / "pretrain_batches.safetensors")
    facts = json.loads((reference / "pretrain.json").read_text())
    lr, decay = facts["optimizer"]["lr"], facts["optimizer"]["weight_decay"]
    names, twin_names = official_names(blip.config), momentum_names(alignment.twin, blip)
    optimizer = torch.optim.AdamW(blip.parameters(), lr=lr, weight_decay=decay)
    for index, step in enumerate(facts["steps"]):
        images, token_ids, text_mask = (
            batches[f"step{index}.{name}"] for name in ("images", "input_ids", "attention_mask")
        )
        ids = torch.arange(images.shape[0]) + 1000 * index
        image_states = blip.encode_image(images)
        context = blip.project_context(image_states)
        assert blip.temperature.item() == pytest.approx(step["temp_used"], rel=1e-6)
        check_norms(
            to_official(dict(alignment.twin.named_parameters()), twin_names),
            step["momentum_norms"],
            (index + 1) * lr,
        )
        draw = RecordingArgmax()
        output = alignment(
            blip, images, image_states, context, token_ids, text_mask, ids, ids,
            step["alpha"], draw,
        )  # fmt: skip
        assert draw.drawn == [
            step["negative_image_index_per_text"],
            step["negative_text_index_per_image"],
        ]
        lm = lm_loss(blip.decode(token_ids, text_mask, context), token_ids, text_mask)
        optimizer.zero_grad()
        (output.itc + output.itm + lm).backward()
        gradients = {name: p.grad for name, p in blip.named_parameters()}
        check_norms(to_official(gradients, names), step["grad_norms"])
        total = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        assert total == pytest.approx(step["grad_norm_total"], rel=1e-4)
        optimizer.step()
        parameters = to_official(dict(blip.named_parameters()), names)
        check_norms(parameters, step["param_norms_after_adamw"], (index + 1) * lr)
        assert blip.temperature.item() == pytest.approx(step["temp_after_adamw"], rel=1e-6)
        alignment.after_optimizer_step(blip, [output.entries])
        assert alignment.queue.pointer == step["queue_ptr_after"]


def test_what_the_first_step_computes_on_its_way(
    reference: Path, official_blip, reference_config
) -> None:
    local = {
        name.removeprefix("step0.local."): tensor
        for name, tensor in load_file(reference / "pretrain_expected.safetensors").items()
        if name.startswith("step0.local.")
    }
    batches = load_file(reference / "pretrain_batches.safetensors")
    [facts, *_] = json.loads((reference / "pretrain.json").read_text())["steps"]
    blip = official_blip()
    alignment = build(reference, blip, "pair", "momentum", reference_config["momentum"])
    images, token_ids, text_mask = (
        batches[f"step0.{name}"] for name in ("images", "input_ids", "attention_mask")
    )
    with torch.no_grad():
        image_states = blip.encode_image(images)
        assert_close(blip.embed_image(image_states), local["image_feat"], atol=1e-5, rtol=1e-5)
        text_embedding = blip.embed_text(blip.encode_text(token_ids, text_mask))
        assert_close(text_embedding, local["text_feat"], atol=1e-5, rtol=1e-5)
        draw = RecordingArgmax()
        ids = torch.arange(images.shape[0])
        context = blip.project_context(image_states)
        alignment(
            blip, images, image_states, context, token_ids, text_mask, ids, ids,
            facts["alpha"], draw,
        )  # fmt: skip
    for weights, name in zip(draw.weights, ("weights_t2i", "weights_i2t"), strict=True):
        assert_close(weights, local[name], atol=1e-5, rtol=1e-5)
    # The original's similarities are already divided by the temperature.
    one = torch.tensor(1.0)
    for direction in ("i2t", "t2i"):
        targets = local[f"sim_{direction}_targets"]
        positives = torch.eye(*targets.shape)
        ours = soft_targets(local[f"sim_{direction}_m"], positives, one, facts["alpha"])
        assert_close(ours, targets, atol=1e-6, rtol=1e-5)
        loss = itc_loss(local[f"sim_{direction}"], targets, one).item()
        assert loss == pytest.approx(local[f"loss_{direction}"].item(), rel=1e-5)
        assert loss == pytest.approx(facts[f"loss_{direction}"], rel=1e-5)
    labels = local["itm_labels"].bool()
    loss = itm_loss(local["vl_output"], labels).item()
    assert loss == pytest.approx(facts["loss_itm"], rel=1e-5)


def test_the_queue_of_repeated_batches(reference: Path, reference_config) -> None:
    facts = json.loads((reference / "pretrain.json").read_text())
    size = load_file(reference / "pretrain_init.safetensors")["image_queue"].shape[1]
    queue = FeatureQueue(size, 2)
    pointers = []
    for _ in facts["queue_pointer_sequence_repeating_step0_batch"]:
        batch = reference_config["batch_size"]
        ids = torch.zeros(batch, dtype=torch.long)
        queue.enqueue(QueueEntries(torch.zeros(batch, 2), torch.zeros(batch, 2), ids, ids))
        pointers.append(int(queue.pointer))
    assert pointers == facts["queue_pointer_sequence_repeating_step0_batch"]


def test_a_new_model_starts_as_the_original_does(reference: Path, official_config) -> None:
    facts = json.loads((reference / "pretrain.json").read_text())["official_init"]
    blip = Blip(official_config)
    assert blip.temperature.item() == pytest.approx(facts["temp"])
    queue = FeatureQueue(16, official_config.embedding_width)
    assert queue.pointer == facts["queue_ptr"]
    assert facts["queue_column_norms_all_one"]
    assert_close(queue.image_embedding.norm(dim=1), torch.ones(16))
    assert_close(queue.text_embedding.norm(dim=1), torch.ones(16))


def test_what_is_tied_in_the_original_is_one_tensor_here(reference: Path, official_config) -> None:
    groups = json.loads((reference / "pretrain.json").read_text())["tied_parameter_groups"]
    kept = {part for parts in official_names(official_config).values() for part in parts}
    first = tied_names(official_config)
    for group in groups:
        assert len({first.get(name, name) for name in group}) == 1, group
        assert len(kept & set(group)) == 1, group


@pytest.mark.parametrize("all_ranks", [False, True])
def test_retrieval_steps(reference: Path, official_blip, reference_config, all_ranks: bool) -> None:
    facts = json.loads((reference / "retrieval.json").read_text())
    batches = load_file(reference / "retrieval_io.safetensors")
    expected = load_file(reference / "retrieval_expected.safetensors")
    blip = official_blip(frozenset({"text", "pair"}))
    alignment = build(reference, blip, "image", "online", reference_config["momentum"])
    lr, decay = facts["optimizer"]["lr"], facts["optimizer"]["weight_decay"]
    names = official_names(blip.config)
    optimizer = torch.optim.AdamW(blip.parameters(), lr=lr, weight_decay=decay)
    compared = set()
    for index, step in enumerate(facts[f"train_negative_all_rank_{all_ranks}"]):
        images, token_ids, text_mask, ids = (
            batches[f"step{index}.{name}"]
            for name in ("images", "input_ids", "attention_mask", "idx")
        )
        image_states = blip.encode_image(images)
        draw = RecordingArgmax()
        output = alignment(
            blip, images, image_states, blip.project_context(image_states), token_ids, text_mask,
            ids, ids, step["alpha"], draw,
        )  # fmt: skip
        assert draw.drawn == [
            step["negative_image_index_per_text"],
            step["negative_text_index_per_image"],
        ]
        local = {
            "image_feat": blip.embed_image(image_states),
            "text_feat": blip.embed_text(blip.encode_text(token_ids, text_mask)),
            "image_feat_m": output.entries.image_embedding,
            "text_feat_m": output.entries.text_embedding,
            "weights_t2i": draw.weights[0],
            "weights_i2t": draw.weights[1],
            "vl_output": output.match_logits,
        }
        for name, value in local.items():
            key = f"nar{int(all_ranks)}.step{index}.local.{name}"
            if key in expected:
                assert_close(value, expected[key], atol=2e-5, rtol=1e-5, msg=key)
                compared.add(name)
        assert output.itc.item() == pytest.approx(step["loss_ita"], rel=1e-5)
        assert output.itm.item() == pytest.approx(step["loss_itm"], rel=1e-5)
        optimizer.zero_grad()
        (output.itc + output.itm).backward()
        gradients = {name: p.grad for name, p in blip.named_parameters()}
        optimizer.step()
        if "grad_norms" in step:
            check_norms(to_official(gradients, names), step["grad_norms"])
            parameters = to_official(dict(blip.named_parameters()), names)
            check_norms(parameters, step["param_norms_after_adamw"], (index + 1) * lr)
        alignment.after_optimizer_step(blip, [output.entries])
        queue = alignment.queue
        for name, value in (
            ("image_queue", queue.image_embedding.T),
            ("text_queue", queue.text_embedding.T),
            ("idx_queue", queue.image_ids[None]),
            ("ptr_queue", queue.pointer[None]),
        ):
            key = f"nar{int(all_ranks)}.step{index}.{name}"
            if key in expected:
                assert_close(value, expected[key], atol=1e-5, rtol=0, msg=key)
                compared.add(name)
    if not all_ranks:
        assert len(compared) == 11, compared
