import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from openblip.answering import Candidates
from openblip.batching import Batcher
from openblip.generation import Decoding
from openblip.images import ImageDecodeError
from openblip.inference import Engine, tokenize
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.models.vqa import vqa_from_blip
from openblip.results import Word, WrittenCaption
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


def engine_of(blip: Blip, tokenizer: Tokenizer, batch_size: int | None = None) -> Engine:
    """Return an engine in float32, which `auto` is not on every processor."""
    return Engine(blip, tokenizer, dtype="float32", batch_size=batch_size)


def write(
    blip: Blip,
    tokenizer: Tokenizer,
    images: Tensor,
    decoding: Decoding,
    seeds: Sequence[int],
    num: int = 1,
) -> list[list[WrittenCaption]]:
    return engine_of(blip, tokenizer).caption(
        images, seeds=seeds, prompt="a red", decoding=decoding, captions_per_image=num
    )


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
    judged = engine_of(blip, tokenizer).match(images, texts)
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
    assert engine_of(blip, tokenizer).match(images, [[]] * 4) == [[]] * 4
    with pytest.raises(ValueError, match="3 lists of texts for 4 images"):
        engine_of(blip, tokenizer).match(images, [TEXTS] * 3)


def test_texts_are_judged_cleaned_and_cut(blip: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    texts = ["a blue dog", " A  BLUE (dog)!", " ".join(["cat"] * 60), ""]
    [[plain, shouted, long, empty], *_] = engine_of(blip, tokenizer).match(
        images, [texts, [], [], []]
    )
    assert plain.match_probability == pytest.approx(shouted.match_probability, abs=1e-6)
    assert 0 <= long.match_probability <= 1
    assert 0 <= empty.match_probability <= 1


def test_embeddings_have_unit_norm_and_know_no_batches(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    whole = engine_of(blip, tokenizer)
    for batch_size in (1, 3, 10):
        engine = engine_of(blip, tokenizer, batch_size=batch_size)
        image_embedding, text_embedding = (
            engine.embed_images(list(images)),
            engine.embed_texts(TEXTS),
        )
        assert_close(image_embedding.norm(dim=1), torch.ones(4))
        assert_close(text_embedding.norm(dim=1), torch.ones(3))
        assert_close(image_embedding, whole.embed_images(images), atol=1e-6, rtol=1e-5)
        assert_close(text_embedding, whole.embed_texts(TEXTS), atol=1e-6, rtol=1e-5)


def test_nothing_is_embedded_as_nothing(blip: Blip, tokenizer: Tokenizer) -> None:
    engine = engine_of(blip, tokenizer)
    assert engine.embed_images([]).shape == (0, 8)
    assert engine.embed_texts([]).shape == (0, 8)
    assert engine.caption([]) == engine.match([], []) == []
    assert engine.match_matrix([], TEXTS).shape == (0, 3)
    assert len(engine.encode([])) == 0


def test_batches_are_full_but_the_last(images: Tensor) -> None:
    assert [len(batch) for batch in Batcher(16, 3).prepared(list(images))] == [3, 1]
    assert [len(batch) for batch in Batcher(16, 2).prepared(list(images))] == [2, 2]
    assert [len(batch) for batch in Batcher(16, 2).prepared(images)] == [4]
    assert list(Batcher(16, 2).prepared([])) == []


def test_an_absent_role_is_named(blip: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    captioner = Blip(blip.config.with_roles(frozenset({"decode"}))).eval()
    with pytest.raises(ValueError, match="no role"):
        Engine(captioner, tokenizer).match(images, [TEXTS] * 4)
    judge = Blip(blip.config.with_roles(frozenset({"text", "pair"}))).eval()
    with pytest.raises(ValueError, match="no role 'decode'"):
        write(judge, tokenizer, images, DECODINGS["greedy"], range(4))
    with pytest.raises(ValueError, match="the model takes 16 x 16"):
        engine_of(blip, tokenizer).embed_images(torch.zeros(1, 3, 24, 24))


def test_one_encoding_serves_all_questions(
    blip: Blip, tokenizer: Tokenizer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(blip, tokenizer)
    matrix = engine.match_matrix(images, TEXTS)
    captions = engine.caption(images, decoding=DECODINGS["greedy"])
    embedding = engine.embed_images(images)
    encoded = engine.encode(images)

    def no_more(*_: object) -> None:
        raise AssertionError("an image is encoded a second time")

    monkeypatch.setattr(engine.backend, "encode_images", no_more)
    monkeypatch.setattr(engine.backend, "embed_images", no_more)
    assert_close(engine.match_matrix(encoded, TEXTS), matrix)
    assert [[c.text for c in several] for several in engine.caption(
        encoded, decoding=DECODINGS["greedy"]
    )] == [[c.text for c in several] for several in captions]  # fmt: skip
    assert_close(engine.embed_images(encoded), embedding, atol=1e-6, rtol=1e-5)
    context = encoded.context
    assert encoded.context is context
    judged = engine.match(encoded, [TEXTS] * 4)
    for row, several in zip(matrix, judged, strict=True):
        assert row.tolist() == pytest.approx([one.match_probability for one in several], abs=1e-6)
    for row, probabilities in zip(
        matrix, engine.match_probabilities(encoded, [TEXTS] * 4), strict=True
    ):
        assert_close(row, probabilities)


def test_an_image_comes_as_file_path_bytes_or_picture(
    blip: Blip, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (40, 30), "red")
    picture.putpixel((3, 3), (0, 0, 255))
    path = tmp_path / "a.png"
    picture.save(path)
    embeddings = engine_of(blip, tokenizer).embed_images([path, path.read_bytes(), picture])
    assert_close(embeddings[0], embeddings[1])
    assert_close(embeddings[0], embeddings[2])
    with pytest.raises(ImageDecodeError, match="not_an_image"):
        engine_of(blip, tokenizer).embed_images([path, b"no image"])


def test_a_batch_that_does_not_fit_is_halved(
    blip: Blip, tokenizer: Tokenizer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(blip, tokenizer, batch_size=4)
    expected = engine.match(list(images), [TEXTS] * 4)
    encode, sizes = engine.backend.encode_images, []

    def small(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(batch)

    monkeypatch.setattr(engine.backend, "encode_images", small)
    judged = engine.match(list(images), [TEXTS] * 4)
    for one, other in zip(judged, expected, strict=True):
        assert [a.match_probability for a in one] == pytest.approx(
            [a.match_probability for a in other], abs=1e-6
        )
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    sizes.clear()
    engine.caption(list(images), decoding=DECODINGS["greedy"])
    assert sizes == [1] * 4  # the size that fits is kept

    def broken(batch: Tensor) -> Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(engine.backend, "encode_images", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        engine.encode(images)


def test_a_model_is_asked_what_it_can(blip: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    engine = engine_of(blip, tokenizer)
    with pytest.raises(ValueError, match="answers no questions"):
        engine.ask(images, [["what?"]] * 4)
    with pytest.raises(ValueError, match="float16 is for GPUs"):
        Engine(blip, tokenizer, dtype="float16")
    with pytest.raises(ValueError, match="3 texts for 4 images"):
        engine.refine(images, TEXTS)


@pytest.mark.parametrize("method", ["greedy", "nucleus"])
def test_words_come_while_a_caption_is_written(
    blip: Blip, tokenizer: Tokenizer, images: Tensor, method: str
) -> None:
    decoding = DECODINGS[method]
    engine = engine_of(blip, tokenizer, batch_size=3)  # two batches
    expected = engine.caption(list(images), decoding=decoding)
    assert engine.caption(list(images), decoding=decoding, on_word=lambda *_: True) == expected
    told: dict[int, list[Word]] = {image: [] for image in range(4)}

    def on_word(image: int, word: Word) -> bool:
        told[image].append(word)
        return not (image == 1 and len(told[image]) == 2)

    captions = engine.caption(list(images), decoding=decoding, on_word=on_word)
    for image, [caption] in enumerate(captions):
        [whole] = expected[image]
        assert tuple(told[image]) == caption.words
        assert " ".join(word.text for word in caption.words) == caption.text
        if image == 1:
            assert len(whole.words) > 2
            assert caption.text.split() == [word.text for word in whole.words[:2]]
            assert not caption.is_finished
        else:  # but for the rounding of a batch that lacks an image
            assert (caption.text, caption.is_finished) == (whole.text, whole.is_finished)
        num_kept = len(caption.token_log_probabilities)
        assert caption.token_log_probabilities == pytest.approx(
            whole.token_log_probabilities[:num_kept], abs=1e-4
        )
    with pytest.raises(ValueError, match="not with beam"):
        engine.caption(images, on_word=on_word)
    with pytest.raises(ValueError, match="nucleus and 2"):
        engine.caption(images, decoding=DECODINGS["nucleus"], captions_per_image=2, on_word=on_word)


def test_the_product_of_all_words_and_the_end_is_the_caption(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    for [caption] in write(blip, tokenizer, images, DECODINGS["beam"], range(4)):
        logs = sum(math.log(word.probability) for word in caption.words)
        end = caption.token_log_probabilities[-1] if caption.is_finished else 0.0
        assert logs + end == pytest.approx(sum(caption.token_log_probabilities), abs=1e-4)


def test_classifying_by_itc_itm_and_both(blip: Blip, tokenizer: Tokenizer, images: Tensor) -> None:
    engine = engine_of(blip, tokenizer)
    names, templates = ["red cat", "dog", "green birds"], ["a {}", "{} on a mat"]
    labels = engine.labels(names, templates)
    plain = engine.classify(images, labels)
    assert plain == engine.classify(images, labels, score="itc")
    assert all(guess.match_probability is None for several in plain for guess in several)
    sentences = [template.replace("{}", name) for name in names for template in templates]
    odds = engine.match_matrix(images, sentences).logit().view(4, 3, 2).mean(dim=2)
    cosines = engine.embed_images(images) @ labels.embedding.T
    expected = {"itm": odds, "both": odds + cosines / blip.temperature.item()}
    for score in ("itm", "both"):
        guessed = engine.classify(list(images), labels, score=score)
        assert engine.classify(engine.encode(images), labels, score=score)[0][0].label == (
            guessed[0][0].label
        )
        for image, several in enumerate(guessed):
            assert sum(guess.probability for guess in several) == pytest.approx(1.0)
            assert several == sorted(several, key=lambda guess: -guess.probability)
            for guess in several:
                place = image, names.index(guess.label)
                share = expected[score].softmax(dim=1)[place]
                assert guess.probability == pytest.approx(float(share), abs=1e-4)
                assert guess.similarity == pytest.approx(float(cosines[place]), abs=1e-5)
                assert guess.match_probability == pytest.approx(
                    float(odds.sigmoid()[place]), abs=1e-4
                )
    [even] = engine.classify(images[:1], labels, temperature=1e6)
    assert [guess.probability for guess in even] == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert [guess.label for guess in even] == [guess.label for guess in plain[0]]
    assert engine.classify([], labels, score="itm") == []
    with pytest.raises(ValueError, match="temperature is 0"):
        engine.classify(images, labels, temperature=0)


def test_ranked_answers_begin_with_the_answer(
    blip: Blip, tokenizer: Tokenizer, images: Tensor
) -> None:
    torch.manual_seed(0)
    engine = Engine(vqa_from_blip(blip).model.eval(), tokenizer, dtype="float32")
    questions = [["what?", "a red cat?"], [], ["a dog?"], ["where?"]]
    chosen = Candidates.of(["cat", "a dog", "green birds"], tokenizer)
    for candidates in (None, chosen):
        single = engine.ask(images, questions, candidates=candidates)
        ranked = engine.ranked_answers(images, questions, candidates=candidates)
        assert [[several[0] for several in own] for own in ranked] == single
        for several in (several for own in ranked for several in own):
            assert sum(answer.probability for answer in several) == pytest.approx(1.0, abs=1e-6)
            assert len({answer.text for answer in several}) == len(several) <= 3
        fewer = engine.ranked_answers(images, questions, candidates=candidates, num_answers=2)
        assert fewer == [[several[:2] for several in own] for own in ranked]
    for several in (several for own in ranked for several in own):
        assert len(several) == 3
        logs = torch.tensor([answer.log_probability for answer in several])
        assert_close(logs.softmax(dim=0), torch.tensor([answer.probability for answer in several]))
        assert list(logs) == sorted(logs, reverse=True)
    shortlisted = engine.ranked_answers(images, questions, candidates=chosen, shortlist=2)
    assert all(len(several) == 2 for own in shortlisted for several in own)
    with pytest.raises(ValueError, match="num_answers 0"):
        engine.ranked_answers(images, questions, num_answers=0)


def test_a_text_is_cut_to_the_positions_of_a_small_model(blip, tokenizer) -> None:
    """BLIP's limit of 35 tokens is more than a model of 12 positions has."""
    text = replace(blip.config.text, max_positions=12)
    small = Blip(replace(blip.config, text=text)).eval()
    engine = engine_of(small, tokenizer)
    long = "a red cat on a blue mat above a house " * 5
    assert engine.tokenize([long]).token_ids.shape == (1, 12)
    assert engine.embed_texts([long]).shape == (1, 8)
