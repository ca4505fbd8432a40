from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openblip.capfilt.captioner import Captioner
from openblip.checkpoint import model_id
from openblip.generation import Decoding

KEYS = ["web_1", "web_2", "folder/web_3"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_caption_says_how_it_came_about(captioner: Captioner, images: Tensor) -> None:
    for [caption], key in zip(captioner.caption(images, KEYS), KEYS, strict=True):
        assert caption.source == "synthetic"
        assert caption.model == captioner.model == model_id(captioner.blip)
        assert caption.decoding == captioner.decoding.to_json()
        assert caption.mean_log_probability is not None
        assert caption.mean_log_probability < 0
        assert caption.match_probability is caption.drop_reason is None
        [[again]] = captioner.caption(images[KEYS.index(key)][None], [key])
        assert again.seed == caption.seed


def test_key_and_seed_fix_a_caption_whatever_else_is_there(
    captioner: Captioner, images: Tensor
) -> None:
    together = [caption.text for [caption] in captioner.caption(images, KEYS)]
    backwards = [caption.text for [caption] in captioner.caption(images.flip(0), KEYS[::-1])]
    alone = [
        captioner.caption(image[None], [key])[0][0].text
        for image, key in zip(images, KEYS, strict=True)
    ]
    assert together == backwards[::-1] == alone


def test_another_key_or_seed_draws_anew(captioner: Captioner, images: Tensor) -> None:
    same = images[:1].expand(20, -1, -1, -1)
    keys = [f"key_{i}" for i in range(20)]
    texts = [caption.text for [caption] in captioner.caption(same, keys)]
    assert len(set(texts)) > 1
    other = [caption.text for [caption] in replace(captioner, seed=1).caption(same, keys)]
    assert texts != other


def test_several_captions_of_an_image(captioner: Captioner, images: Tensor) -> None:
    several = replace(captioner, captions_per_image=5).caption(images, KEYS)
    assert [len(captions) for captions in several] == [5, 5, 5]
    assert all(len({caption.text for caption in captions}) > 1 for captions in several)
    assert [captions[0].text for captions in several] == [
        caption.text for [caption] in captioner.caption(images, KEYS)
    ]


def test_more_than_the_method_gives_is_refused(captioner: Captioner, images: Tensor) -> None:
    greedy = replace(captioner, decoding=Decoding(method="greedy"), captions_per_image=2)
    with pytest.raises(ValueError, match="captions_per_image 2"):
        greedy.caption(images, KEYS)
