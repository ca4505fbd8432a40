"""Tiny random BLIPs of transformers, converted: the same states, features, logits and captions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open
from torch.testing import assert_close
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
)

from openblip.checkpoint import save_checkpoint
from openblip.convert import Converted, convert_to_openblip, convert_to_transformers, read_foreign
from openblip.generation import Decoding, generate
from openblip.hub import load, load_vqa
from openblip.images import eval_transform
from openblip.models.vqa import Vqa

TEXTS = ["a red dog on the grass", "Two cats, sitting!", "a woman's cake"]


def tiny(words: list[str], text_width: int = 24) -> BlipConfig:
    """Return sizes that all differ; weights wide enough that errors show."""
    text = {
        "vocab_size": len(words) + 2, "hidden_size": text_width, "intermediate_size": 40,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 30,
        "bos_token_id": len(words), "sep_token_id": words.index("[SEP]"),
        "pad_token_id": words.index("[PAD]"), "eos_token_id": words.index("[SEP]"),
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 24, "patch_size": 8, "initializer_range": 0.02,
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=12)


@pytest.fixture
def words(reference: Path) -> list[str]:
    return (reference / "vocab.txt").read_text().split()


@pytest.fixture
def saved(words: list[str], reference: Path, tmp_path: Path) -> Callable[[type], Path]:
    """Save a seeded model of a class with a vocabulary beside it."""

    def save(kind: type, text_width: int = 24) -> Path:
        torch.manual_seed(3)
        folder = tmp_path / kind.__name__
        model = kind(tiny(words, text_width)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # LayerNorms and biases too: at their start they hide swapped names.
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(folder)
        (folder / "vocab.txt").write_bytes((reference / "vocab.txt").read_bytes())
        return folder

    return save


def batch(converted: Converted) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, token_ids and text_mask, the texts padded."""
    tokens = converted.tokenizer.encode_batch(TEXTS, max_tokens=20)
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    assert (tokens.text_mask == 0).any()
    return images, tokens.token_ids, tokens.text_mask


@torch.no_grad()
def test_retrieval(saved) -> None:
    folder = saved(BlipForImageTextRetrieval)
    theirs = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    converted = read_foreign(folder)
    blip = converted.model
    images, token_ids, text_mask = batch(converted)
    image_states = blip.encode_image(images)
    expected = theirs(token_ids, images, use_itm_head=False, attention_mask=text_mask)
    assert_close(image_states, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    text_states = blip.encode_text(token_ids, text_mask)
    assert_close(text_states, expected.question_embeds, atol=1e-5, rtol=1e-5)
    similarity = blip.embed_image(image_states) @ blip.embed_text(text_states).T
    assert_close(similarity, expected.itm_score, atol=1e-5, rtol=1e-5)
    context = blip.project_context(image_states)
    # transformers leaves [CLS] in place, `Blip.encode_pair` puts [ENC] there.
    expected = theirs(token_ids, images, attention_mask=text_mask).itm_score
    pair_states = blip.text.encode_pair(token_ids, text_mask, context)
    assert_close(blip.match_logits(pair_states), expected, atol=1e-5, rtol=1e-5)
    with_enc = token_ids.clone()
    with_enc[:, 0] = converted.tokenizer.special.enc
    expected = theirs(with_enc, images, attention_mask=text_mask).itm_score
    logits = blip.match_logits(blip.encode_pair(token_ids, text_mask, context))
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.std() > 1e-3
    told = " ".join(converted.report.notes)
    for expected in ("keeps no temperature", "[CLS] first", "eps is 1e-05"):
        assert expected in told


@torch.no_grad()
def test_captioning(saved) -> None:
    folder = saved(BlipForConditionalGeneration)
    theirs = BlipForConditionalGeneration.from_pretrained(folder).eval()
    converted = read_foreign(folder)
    blip, tokens = converted.model, converted.tokenizer.special
    images, token_ids, text_mask = batch(converted)
    token_ids[:, 0] = tokens.dec
    expected = theirs(images, token_ids, attention_mask=text_mask)
    image_states = blip.encode_image(images)
    assert_close(image_states, expected.image_embeds, atol=1e-5, rtol=1e-5)
    context = blip.project_context(image_states)
    real = text_mask.bool()
    logits = blip.decode(token_ids, text_mask, context)
    assert_close(logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    finished = set()
    # More and more bias makes first some captions end, then all.
    for bias in (0.0, 0.9, 9.0):
        theirs.text_decoder.cls.predictions.bias[tokens.sep] += bias
        blip.text.lm_head.bias[tokens.sep] += bias
        for prompt in ([], converted.tokenizer.encode("a picture of")[1:-1]):
            given = torch.tensor([[tokens.dec, *prompt, tokens.sep]]).repeat(3, 1)
            ids = theirs.generate(
                images, given, max_new_tokens=9, num_beams=1, do_sample=False
            )[:, 1 + len(prompt) :].tolist()  # fmt: skip
            decoding = Decoding(method="greedy", min_tokens=0, max_tokens=9)
            captions = generate(
                blip, context, prompt_ids=prompt, tokens=tokens, decoding=decoding, seeds=[0] * 3
            )
            for [caption], row in zip(captions, ids, strict=True):
                end = [tokens.sep] if caption.is_finished else []
                assert [*caption.token_ids, *end] == [i for i in row if i != tokens.pad]
                finished.add(caption.is_finished)
    assert finished == {True, False}


@torch.no_grad()
def test_beams(saved) -> None:
    """Today's transformers counts generated tokens, as scoring `openblip` does."""
    folder = saved(BlipForConditionalGeneration)
    theirs = BlipForConditionalGeneration.from_pretrained(folder).eval()
    converted = read_foreign(folder)
    blip, tokens = converted.model, converted.tokenizer.special
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    context = blip.project_context(blip.encode_image(images))
    finished = set()
    for bias in (0.0, 2.0, 3.0):  # adds up: more and more captions end
        theirs.text_decoder.cls.predictions.bias[tokens.sep] += bias
        blip.text.lm_head.bias[tokens.sep] += bias
        for prompt in ([], converted.tokenizer.encode("a picture of")[1:-1]):
            given = torch.tensor([[tokens.dec, *prompt, tokens.sep]]).repeat(len(images), 1)
            for num_beams in (2, 5):
                ids = theirs.generate(
                    images, given, max_new_tokens=9, num_beams=num_beams, do_sample=False
                )[:, 1 + len(prompt) :].tolist()  # fmt: skip
                captions = generate(
                    blip, context, prompt_ids=prompt, tokens=tokens, seeds=[0] * len(images),
                    decoding=Decoding(num_beams=num_beams, min_tokens=0, max_tokens=9),
                )  # fmt: skip
                for [caption], row in zip(captions, ids, strict=True):
                    end = [tokens.sep] if caption.is_finished else []
                    assert [*caption.token_ids, *end] == [i for i in row if i != tokens.pad]
                    finished.add(caption.is_finished)
    assert finished == {True, False}


@torch.no_grad()
def test_question_answering(saved) -> None:
    # Their answer decoder expects the width of the images, and is given questions.
    folder = saved(BlipForQuestionAnswering, 32)
    theirs = BlipForQuestionAnswering.from_pretrained(folder).eval()
    vqa, tokenizer = load_vqa(folder)
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    questions = tokenizer.encode_batch(TEXTS, max_tokens=20)
    answers = tokenizer.encode_batch(["red", "two cats", "a cake, a woman"], max_tokens=20)
    for batch in (questions, answers):
        assert (batch.text_mask == 0).any()
    with_enc, with_dec = questions.token_ids.clone(), answers.token_ids.clone()
    with_enc[:, 0], with_dec[:, 0] = tokenizer.special.enc, tokenizer.special.dec
    image_states = vqa.encode_image(images)
    expected = theirs.vision_model(images).last_hidden_state
    assert_close(image_states, expected, atol=1e-5, rtol=1e-5)
    expected = theirs.text_encoder(
        with_enc, attention_mask=questions.text_mask, encoder_hidden_states=expected
    )[0]
    states = vqa.encode_question(
        questions.token_ids, questions.text_mask, vqa.project_image(image_states)
    )
    assert_close(states, expected, atol=1e-5, rtol=1e-5)
    expected = theirs.text_decoder(
        with_dec, attention_mask=answers.text_mask, encoder_hidden_states=expected,
        encoder_attention_mask=questions.text_mask,
    ).logits  # fmt: skip
    # Today's transformers loses the mask on its way to the cross-attention: padding is seen.
    context = vqa.project_question(states, torch.ones_like(questions.text_mask))
    logits = vqa.decode(answers.token_ids, answers.text_mask, context)
    real = answers.text_mask.bool()
    assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    ids = theirs.generate(
        with_enc, images, questions.text_mask, max_new_tokens=6, num_beams=3, do_sample=False
    )[:, 1:].tolist()
    written = generate(
        vqa, context, prompt_ids=[], tokens=tokenizer.special, seeds=[0] * 3,
        decoding=Decoding(num_beams=3, min_tokens=0, max_tokens=6),
    )  # fmt: skip
    for [answer], row in zip(written, ids, strict=True):
        end = [tokenizer.special.sep] if answer.is_finished else []
        assert [*answer.token_ids, *end] == [i for i in row if i != tokenizer.special.pad]
    with pytest.raises(ValueError, match="is a VQA model"):
        load(folder)
    assert isinstance(read_foreign(folder).model, Vqa)


@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BlipForImageTextRetrieval])
def test_their_folder_comes_back_bit_equal(kind: type, saved, tmp_path: Path) -> None:
    folder = saved(kind)
    convert_to_openblip(folder, tmp_path / "ours")
    report = convert_to_transformers(tmp_path / "ours", tmp_path / "back")
    assert report.kind == kind.__name__
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    carried = after.pop("openblip")
    assert set(carried) <= {"drop_path", "vision_init_std", "position_init_std", "temperature"}
    for part in ("text_config", "vision_config"):
        assert after[part].items() <= before[part].items()
    assert {k: v for k, v in after.items() if not k.endswith("_config")}.items() <= before.items()


@torch.no_grad()
@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BlipForImageTextRetrieval])
def test_transformers_loads_what_we_write(kind: type, reference: Path, tmp_path: Path) -> None:
    converted = read_foreign(reference / "pretrain_init.safetensors")
    blip, tokenizer = converted.model, converted.tokenizer
    blip.temperature.fill_(0.2)
    save_checkpoint(tmp_path / "ours", blip, tokenizer, "# A card\n")
    folder = tmp_path / "theirs"
    convert_to_transformers(tmp_path / "ours", folder, architecture=kind.__name__)
    theirs, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = BlipProcessor.from_pretrained(folder)
    assert isinstance(processor.tokenizer, BertTokenizer)
    image = torch.randint(0, 256, (20, 30, 3), generator=torch.Generator().manual_seed(1))
    picture = Image.fromarray(image.to(torch.uint8).numpy())
    inputs = processor(images=[picture] * 3, text=TEXTS, return_tensors="pt", padding=True)
    ours = tokenizer.encode_batch(TEXTS, max_tokens=20)
    assert torch.equal(inputs["input_ids"], ours.token_ids)
    assert torch.equal(inputs["attention_mask"], ours.text_mask)
    assert processor.tokenizer.convert_tokens_to_ids("[ENC]") == tokenizer.special.enc
    pixels = eval_transform(picture, blip.config.vision.image_size_px)
    assert_close(inputs["pixel_values"][0], pixels, atol=1e-5, rtol=1e-5)
    states = theirs.eval().vision_model(pixels[None]).last_hidden_state
    assert_close(states, blip.encode_image(pixels[None]), atol=1e-5, rtol=1e-5)
    # What transformers saves again still brings our temperature back.
    theirs.save_pretrained(tmp_path / "resaved")
    processor.save_pretrained(tmp_path / "resaved")
    again = read_foreign(tmp_path / "resaved")
    assert again.model.config == blip.config.with_roles(again.model.config.text.roles)
    if kind is BlipForImageTextRetrieval:
        assert torch.equal(again.model.temperature, blip.temperature)
    assert again.tokenizer.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
