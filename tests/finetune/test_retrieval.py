"""Wrong texts from another data set: which are drawn, when, and how many are held."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openblip.data.batches import ImageTextBatch
from openblip.finetune import retrieval
from openblip.finetune.retrieval import NegativeTexts, RetrievalRecipe, RetrievalStep
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer
from openblip.training.alignment import AlignmentConfig

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


def test_ranks_and_the_batches_of_a_step_draw_other_texts(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", [f"w{i}" for i in range(50)])
    recipe = RetrievalRecipe(negatives_share=1.0)
    texts = NegativeTexts([path], tokenizer, recipe)
    drawn = [texts.draw(200, 3, CPU, rank, number) for rank in range(2) for number in range(2)]
    told = {tuple(one.token_ids[:, 1].tolist()) for one in drawn if one is not None}
    assert len(told) == 4
    # One rank without accumulation draws what it drew before there were rank and number.
    rng = np.random.default_rng([recipe.seed, 3])
    rng.random(200)
    assert words(texts, 3) == [5 + int(i) for i in rng.integers(50, size=200)]


def test_a_step_counts_its_batches() -> None:
    class Numbers(NegativeTexts):
        def __init__(self) -> None:
            self.asked: list[tuple[int, int, int]] = []

        def draw(
            self, batch_size: int, step: int, device: torch.device, rank: int = 0, number: int = 0
        ) -> None:
            self.asked.append((step, rank, number))

    blip = Blip(
        BlipConfig(
            VisionConfig(8, 8, 8, 1, 1),
            MedConfig(20, 8, 1, 1, 8, 8, 8, roles=frozenset({"text", "pair"})),
            SpecialTokens(0, 2, 3, 5, 6),
            embedding_width=4,
        )
    )
    negatives = Numbers()
    recipe = RetrievalRecipe(alignment=AlignmentConfig("image", "online", queue_size=4))
    step = RetrievalStep(blip, recipe, negatives)
    ids = torch.arange(2)
    tokens = torch.tensor([[2, 7, 3], [2, 8, 3]])
    batch = ImageTextBatch(torch.zeros(2, 3, 8, 8), tokens, torch.ones_like(tokens), ids, ids)
    for number in (0, 0, 1, 1, 1, 4):
        step(batch, number)
    assert negatives.asked == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 0, 2), (4, 0, 0)]


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
