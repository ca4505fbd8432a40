"""Wrong texts from another data set: which are drawn, when, and how many are held."""

import json
from pathlib import Path

import pytest
import torch

from openblip.finetune import retrieval
from openblip.finetune.retrieval import NegativeTexts, RetrievalRecipe
from openblip.tokenizer import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
CPU = torch.device("cpu")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocabulary(WORDS)


def write(path: Path, captions: list[str]) -> Path:
    lines = [
        json.dumps({"key": str(i), "image_base64": "AAAA", "captions": [{"text": text}]})
        for i, text in enumerate(captions)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def words(texts: NegativeTexts, step: int, batch_size: int = 200) -> list[int]:
    drawn = texts.draw(batch_size, step, CPU)
    return [] if drawn is None else drawn.token_ids[:, 1].tolist()


def test_a_share_of_the_images_gets_any_of_the_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [f"w{i}" for i in range(50)])
    texts = NegativeTexts([path], tokenizer, RetrievalRecipe(negatives_share=0.3))
    drawn = texts.draw(20_000, 0, CPU)
    assert drawn is not None
    assert len(drawn.rows) / 20_000 == pytest.approx(0.3, abs=0.02)
    assert drawn.rows.unique().numel() == len(drawn.rows)
    counts = drawn.token_ids[:, 1].bincount()[5:]
    assert counts.shape == (50,)
    assert counts.min() > 0.6 * len(drawn.rows) / 50
    assert (
        NegativeTexts([path], tokenizer, RetrievalRecipe(negatives_share=0.0)).draw(9, 0, CPU)
        is None
    )


def test_a_step_draws_the_same_whenever_it_is_taken(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [f"w{i}" for i in range(50)])
    texts, again = (NegativeTexts([path], tokenizer, RetrievalRecipe()) for _ in range(2))
    first = [words(texts, step) for step in range(3)]
    assert [words(again, step) for step in (2, 1, 0)] == first[::-1]
    assert first[0] != first[1]


def test_of_too_many_texts_any_may_stay(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "MAX_NEGATIVE_TEXTS", 10)
    path = write(tmp_path / "a.jsonl", [f"w{i}" for i in range(50)])
    seen: set[int] = set()
    for seed in range(40):
        found = set(words(NegativeTexts([path], tokenizer, RetrievalRecipe(seed=seed)), 0, 500))
        assert len(found) == 10
        seen |= found
    assert len(seen) == 50


def test_no_text_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", ["...", "!"])
    with pytest.raises(ValueError, match=r"no caption in .*a\.jsonl to take as wrong text"):
        NegativeTexts([path], tokenizer, RetrievalRecipe())
