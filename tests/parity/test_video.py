"""The official video evaluation: score matrices and recalls of a few frames per video."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from openblip.data.video import uniform_frames
from openblip.evaluation.metrics import median_rank, retrieval_recalls
from openblip.evaluation.retrieval import NOT_JUDGED
from openblip.evaluation.video import score_videos
from openblip.inference import Engine
from openblip.tokenizer import TokenBatch


def test_score_matrices_and_recalls(reference: Path, official_blip) -> None:
    facts = json.loads((reference / "video_retrieval.json").read_text())
    tensors = load_file(reference / "video_retrieval.safetensors")
    videos = tensors["video"]
    assert videos.shape[1] == facts["frames"]
    tokens = TokenBatch(tensors["input_ids"], tensors["attention_mask"], 0)
    blip = official_blip(frozenset({"text", "pair"}))
    engine = Engine.plain(blip, tokenizer=None)
    scores = score_videos(engine, list(videos), tokens, shortlist=facts["k_test"])
    for ours, name in ((scores.image_to_text, "v2t"), (scores.text_to_image, "t2v")):
        expected = tensors[f"score_matrix_{name}"]
        assert torch.equal(ours == NOT_JUDGED, expected == NOT_JUDGED)
        assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    owners = torch.arange(len(videos))
    recalls = retrieval_recalls(scores.image_to_text, scores.text_to_image, owners)
    expected = facts["itm_eval"]
    is_match = torch.eye(len(videos), dtype=torch.bool)
    assert median_rank(scores.text_to_image, is_match) == expected["vid_mdR"]
    assert (recalls.tr_at_1, recalls.ir_at_1) == (expected["txt_r1"], expected["vid_r1"])
    assert (recalls.tr_at_5, recalls.ir_at_5) == (expected["txt_r5"], expected["vid_r5"])
    assert recalls.mean == pytest.approx(expected["r_mean"])


@pytest.mark.parametrize(("num_frames", "wanted"), [(8, 8), (9, 8), (100, 8), (331, 8), (12, 5)])
def test_frames_are_those_of_the_original(num_frames: int, wanted: int) -> None:
    # What video_dataset.py does; for fewer frames than wanted it repeats the first.
    expected = np.arange(0, num_frames, num_frames / wanted, dtype=int)
    assert uniform_frames(num_frames, wanted) == expected.tolist()
