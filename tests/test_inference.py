from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from openblip.generation import Decoding
from openblip.inference import (
    WrittenCaption,
    batched,
    caption_images,
    embed_images,
    embed_texts,
    judge_texts,
    tokenize,
)
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer

TEXTS = ["a red cat on a mat", "a blue dog", "two green birds above a house"]
DECODINGS = {
    "greedy": Decoding(method="greedy", min_tokens=2, max_tokens=8),
    "beam": Decoding(method="beam", num_beams=3, min_tokens=2, max_tokens=8),
    "nucleus": Decoding(method="nucleus", min_tokens=2, max_tokens=8),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=80, min_frequency=1)


@pytest.fixture(scope="module")
def blip(tokenizer: Tokenizer) -> Blip:
    torch.manual_seed(0)
    config = BlipConfig(
        vision=VisionConfig(
            image_size_px=16, patch_size_px=8, width=32, num_layers=2, num_heads=2, init_std=0.3
        ),
        text=MedConfig(
            vocab_size=tokenizer.vocab_size, width=32, num_layers=2, num_heads=2, ffn_width=64,
            max_positions=40, context_width=32, init_std=0.3,
        ),
        tokens=tokenizer.special,
        embedding_width=8,
    )  # fmt: skip
    return Blip(config).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def write(
    blip: Blip,
    tokenizer: Tokenizer,
    images: Tensor,
    decoding: Decoding,
    seeds: Sequence[int],
    num: int = 1,
) -> list[list[WrittenCaption]]:
    return caption_images(
        blip, tokenizer, images, seeds=seeds, prompt="a red", decoding=decoding,
        captions_per_image=num,
    )  # fmt: skip


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_an_image_alone_gets_the_caption_that_it_gets_in_a_batch(
    blip: Blip, tokenizer: Tokenizer, images: Tensor, decoding: Decoding
) -> None:
    together = write(blip, tokenizer, images, decoding, range(4))
    for image in range(4):
        [[alone]] = write(blip, tokenizer, images[image : image + 1], decoding, [image])
        [caption] = together[image]
        assert (alone.text, alone.is_finished) == (caption.text, caption.is_finished)
        assert alone.token_log_probabilities == pytest.approx(
            caption.token_log_probabilities, abs=1e-4
        )


def test_a_caption_tells_neither_prompt_nor_special_tokens(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    for [caption] in write(blip, tokenizer, images, DECODINGS["greedy"], range(4)):
        assert "[" not in caption.text
        num_tokens = len(caption.token_log_probabilities)
        mean = sum(caption.token_log_probabilities) / num_tokens
        assert caption.mean_log_probability == pytest.approx(mean)
        assert caption.mean_log_probability < 0


def test_a_prompt_is_what_the_decoder_has_read(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    """The first token's log-probability is that of the logits behind [DEC] and the prompt."""
    [[caption], *_] = write(blip, tokenizer, images, DECODINGS["greedy"], range(4))
    ids = torch.tensor([tokenizer.encode("a red")[:-1]])
    with torch.no_grad():
        context = blip.project_context(blip.encode_image(images[:1]))
        logs = blip.decode(ids, torch.ones_like(ids), context).log_softmax(dim=-1)[0, -1]
    logs[tokenizer.special.sep] = -torch.inf  # min_tokens
    assert caption.token_log_probabilities[0] == pytest.approx(float(logs.max()), abs=1e-5)


def test_several_captions_per_image(blip: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    for decoding in (DECODINGS["beam"], DECODINGS["nucleus"]):
        captions = write(blip, tokenizer, images, decoding, range(4), num=3)
        assert [len(several) for several in captions] == [3] * 4
    with pytest.raises(ValueError, match="captions_per_image 2"):
        write(blip, tokenizer, images, DECODINGS["greedy"], range(4), num=2)
    with pytest.raises(ValueError, match="2 seeds for 4 images"):
        write(blip, tokenizer, images, DECODINGS["greedy"], range(2))


def test_any_number_of_texts_is_judged_as_each_pair_alone(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    texts = [TEXTS, [], [TEXTS[1]], [TEXTS[2], TEXTS[0]]]
    judged = judge_texts(blip, tokenizer, images, texts)
    assert [len(several) for several in judged] == [3, 0, 1, 2]
    for image, several in enumerate(texts):
        for text, judgement in zip(several, judged[image], strict=True):
            tokens = tokenize(tokenizer, [text])
            with torch.no_grad():
                image_states = blip.encode_image(images[image : image + 1])
                pair_states = blip.encode_pair(
                    tokens.token_ids, tokens.text_mask, blip.project_context(image_states)
                )
                probability = blip.match_logits(pair_states).softmax(dim=1)[0, 1].item()
                text_states = blip.encode_text(tokens.token_ids, tokens.text_mask)
                similarity = blip.embed_image(image_states) @ blip.embed_text(text_states).T
            assert judgement.match_probability == pytest.approx(probability, abs=1e-5)
            assert judgement.similarity == pytest.approx(similarity.item(), abs=1e-5)


def test_images_without_any_text_are_judged_empty(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    assert judge_texts(blip, tokenizer, images, [[]] * 4) == [[]] * 4
    with pytest.raises(ValueError, match="3 lists of texts for 4 images"):
        judge_texts(blip, tokenizer, images, [TEXTS] * 3)


def test_texts_are_judged_cleaned_and_cut(blip: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    texts = ["a blue dog", " A  BLUE (dog)!", " ".join(["cat"] * 60), ""]
    [[plain, shouted, long, empty], *_] = judge_texts(blip, tokenizer, images, [texts, [], [], []])
    assert plain.match_probability == pytest.approx(shouted.match_probability, abs=1e-6)
    assert 0 <= long.match_probability <= 1
    assert 0 <= empty.match_probability <= 1


def test_embeddings_have_unit_norm_and_know_no_batches(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    tokens = tokenize(tokenizer, TEXTS)
    for batch_size in (1, 3, 10):
        image_embedding = embed_images(blip, images, batch_size=batch_size)
        text_embedding = embed_texts(blip, tokens, batch_size=batch_size)
        assert_close(image_embedding.norm(dim=1), torch.ones(4))
        assert_close(text_embedding.norm(dim=1), torch.ones(3))
        assert_close(image_embedding, embed_images(blip, images), atol=1e-6, rtol=1e-5)
        assert_close(text_embedding, embed_texts(blip, tokens), atol=1e-6, rtol=1e-5)


def test_nothing_is_embedded_as_nothing(blip: Blip, tokenizer: Tokenizer) -> None:
    assert embed_images(blip, []).shape == (0, 8)
    assert embed_texts(blip, tokenize(tokenizer, [])).shape == (0, 8)


def test_batches_are_full_but_the_last(images: Tensor) -> None:
    assert [len(batch) for batch in batched(images, 3)] == [3, 1]
    assert [len(batch) for batch in batched(images, 2)] == [2, 2]
    assert list(batched([], 2)) == []


def test_an_absent_role_is_named(blip: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    captioner = Blip(blip.config.with_roles(frozenset({"decode"}))).eval()
    with pytest.raises(ValueError, match="no role"):
        judge_texts(captioner, tokenizer, images, [TEXTS] * 4)
    judge = Blip(blip.config.with_roles(frozenset({"text", "pair"}))).eval()
    with pytest.raises(ValueError, match="no role 'decode'"):
        write(judge, tokenizer, images, DECODINGS["greedy"], range(4))
    with pytest.raises(ValueError, match="the model takes 16 x 16"):
        embed_images(blip, torch.zeros(1, 3, 24, 24))
