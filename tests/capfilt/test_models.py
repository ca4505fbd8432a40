import torch

from openblip.capfilt.captioner import DECIMALS
from openblip.capfilt.models import EncodedBatch, Models
from openblip.checkpoint import model_id
from openblip.data.samples import Caption
from openblip.inference import Engine


def test_a_filter_adds_its_judgement_and_its_name(models: Models) -> None:
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    captions = [[Caption("a blue dog"), Caption("a red cat", "human", seed=3)], []]
    [judge] = models.filters
    first, second = models.judge(EncodedBatch({24: images}), captions)
    assert second == []
    expected = Engine(judge.blip, judge.tokenizer, dtype="float32").match(
        images, [["a blue dog", "a red cat"], []]
    )
    for caption, judgement in zip(first, expected[0], strict=True):
        assert caption.match_probability == round(judgement.match_probability, DECIMALS)
        assert caption.similarity == round(judgement.similarity, DECIMALS)
        assert caption.filter_model == judge.model == model_id(judge.blip)
    assert (first[1].source, first[1].seed, first[1].text) == ("human", 3, "a red cat")
