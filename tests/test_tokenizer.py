import json
import random
from pathlib import Path

import pytest

from openblip.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(reference: Path) -> Tokenizer:
    words = (reference / "vocab.txt").read_text().splitlines()
    return Tokenizer.from_vocabulary(words)


def test_ids_and_texts_equal_the_reference(reference: Path, tokenizer: Tokenizer) -> None:
    facts = json.loads((reference / "tokenizer.json").read_text())
    assert tokenizer.vocab_size == facts["len"]
    special = tokenizer.special
    assert (special.pad, special.cls, special.sep) == tuple(
        facts["ids"][name] for name in ("pad", "cls", "sep")
    )
    assert (special.dec, special.enc) == (facts["ids"]["bos_[DEC]"], facts["ids"]["enc_[ENC]"])
    for case in facts["cases"]:
        assert tokenizer.encode(case["text"]) == case["input_ids"]
        assert tokenizer.decode(case["input_ids"]) == case["decoded_skip_special"]
        batch = tokenizer.encode_batch([case["text"]], max_tokens=12, pad_to=12)
        assert batch.token_ids[0].tolist() == case["max_length_pad_12"]


def test_a_batch_is_padded_to_its_longest_text_and_counts_what_it_cut(
    tokenizer: Tokenizer,
) -> None:
    batch = tokenizer.encode_batch(["old pizza", "old pizza large in right at"], max_tokens=5)
    assert batch.token_ids.shape == (2, 5)
    assert batch.num_truncated == 1
    assert batch.token_ids[1, -1] == tokenizer.special.sep
    assert batch.text_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_trained_tokenizer_survives_its_file(tmp_path: Path) -> None:
    trained = Tokenizer.train(["a red cat", "a blue cat", "a red dog"], vocab_size=60)
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.special == trained.special
    assert loaded.encode("a red dog") == trained.encode("a red dog")
    assert loaded.decode(loaded.encode("a red cat")) == "a red cat"


def test_errors_say_what_is_wrong(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"lacks \[CLS\]"):
        Tokenizer.from_vocabulary(["[PAD]", "[UNK]", "[SEP]", "cat"])
    with pytest.raises(ValueError, match="max_tokens 2"):
        tokenizer.encode_batch(["a"], max_tokens=2)


def test_the_same_texts_in_any_order_train_the_same_vocabulary(tmp_path: Path) -> None:
    """The trainer's hash maps are seeded anew each time, so a few trainings would differ."""
    text = "the red circle stands left of a blue square, which isn't big: über-größe 紅"
    words = text.split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    files = set()
    for seed in range(6):
        shuffled = random.Random(seed).sample(texts, len(texts))
        Tokenizer.train(iter(shuffled), vocab_size=90).save(tmp_path / "tokenizer.json")
        files.add((tmp_path / "tokenizer.json").read_text())
    assert len(files) == 1


def test_half_a_character_is_no_reason_to_stop() -> None:
    """As in a caption that was cut within an emoji; the library underneath takes UTF-8 alone."""
    texts = ["a dog \ud83d", "ein K\u00e4tzchen \ud83d\udc08", "a dog"]
    tokenizer = Tokenizer.train(texts, vocab_size=60, min_frequency=1)
    cut, whole, plain = (tokenizer.encode(text) for text in texts)
    assert cut == plain
    assert whole == tokenizer.encode("ein K\u00e4tzchen \U0001f408")
    batch = tokenizer.encode_batch(texts, max_tokens=30)
    assert batch.token_ids[0, : len(cut)].tolist() == cut


def test_words_of_a_text_have_the_places_of_their_tokens(tokenizer: Tokenizer) -> None:
    text = "  Café-cats aren't \u00ad unbelievable,\tare they?"
    words = tokenizer.words_of_text(text, max_tokens=30)
    assert [word for word, _ in words] == ["Café-cats", "aren't", "unbelievable,", "are", "they?"]
    ids = tokenizer.encode_batch([text], max_tokens=30).token_ids[0].tolist()
    places = [place for _, several in words for place in several]
    assert places == list(range(1, len(ids) - 1))
    for word, several in words:
        assert [ids[place] for place in several] == tokenizer.encode(word)[1:-1]
    cut = tokenizer.words_of_text(text, max_tokens=6)
    assert [place for _, several in cut for place in several] == [1, 2, 3, 4]
    assert tokenizer.words_of_text(" \n", max_tokens=6) == []
