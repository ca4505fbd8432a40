"""Zero-shot video-text retrieval: a model of images looks at some frames (BLIP sec. 5.6).

The frames' class states are projected, averaged and normalised for ITC; for ITM the text looks at
the states of all frames, one behind the other.

Letters: V videos, T texts, F frames, N patches, S image side in pixels, E embedding width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openblip.batching import Encoded
from openblip.data.video import VideoText, find_video, read_frames
from openblip.evaluation.metrics import RetrievalRecalls, median_rank, retrieval_recalls
from openblip.evaluation.retrieval import RetrievalScores, rerank
from openblip.inference import Engine
from openblip.tokenizer import TokenBatch


@dataclass(frozen=True)
class VideoReport:
    """Recalls by ITC alone and re-ranked: tr finds texts for a video, ir videos for a text.

    median_rank  of a text's video, re-ranked
    """

    itc: RetrievalRecalls
    reranked: RetrievalRecalls
    median_rank: float
    num_videos: int
    num_texts: int
    num_frames: int
    shortlist: int

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "itc": self.itc.to_json(),
            "reranked": self.reranked.to_json(),
            "median_rank": self.median_rank,
            "num_videos": self.num_videos,
            "num_texts": self.num_texts,
            "num_frames": self.num_frames,
            "shortlist": self.shortlist,
        }


@torch.no_grad()
def score_videos(
    engine: Engine, videos: Iterable[Tensor], tokens: TokenBatch, *, shortlist: int
) -> RetrievalScores:
    """Score every video with every text by ITC, and each one's K best by ITM.

    videos   frames (F, 3, S, S) each; gone through twice, so that no frame states need be kept
    Returns  scores as of images
    Raises ValueError if `videos` is an iterator, which is empty the second time.
    Source: `evaluation` of the released eval_retrieval_video.py.
    """
    text_embedding = engine.embed_texts(tokens)
    # The mean is taken before a frame's length is made one; the projection is linear, so it is
    # taken of the states.
    embeddings = [torch.zeros(0, text_embedding.shape[1])]
    for frames in videos:
        mean_states = engine.encode(frames).states.mean(dim=0, keepdim=True)
        embeddings.append(engine.embed_images(Encoded(mean_states, engine.backend)))
    similarity = torch.cat(embeddings) @ text_embedding.T
    encoded = (
        Encoded(engine.encode(frames).states.flatten(0, 1)[None], engine.backend)
        for frames in videos
    )
    return rerank(engine, similarity, encoded, tokens, shortlist=shortlist)


def evaluate_videos(
    engine: Engine,
    texts: Sequence[VideoText],
    folder: Path,
    *,
    num_frames: int,
    shortlist: int,
) -> VideoReport:
    """Measure retrieval between texts and the videos of a folder that they name.

    num_frames  taken of each video at equal distances
    Raises ValueError for no text, and for a video that is absent or cannot be read.
    """
    if not texts:
        raise ValueError("there is no text to evaluate on")
    names = list(dict.fromkeys(text.video for text in texts))
    paths = [find_video(folder, name) for name in names]
    videos = _Videos(paths, num_frames, engine.image_size_px)
    tokens = engine.tokenize([text.text for text in texts])
    scores = score_videos(engine, videos, tokens, shortlist=shortlist)
    number_of = {name: number for number, name in enumerate(names)}
    owners = torch.tensor([number_of[text.video] for text in texts])
    is_match = owners[:, None] == torch.arange(len(names))
    return VideoReport(
        itc=retrieval_recalls(scores.similarity, scores.similarity.T, owners),
        reranked=retrieval_recalls(scores.image_to_text, scores.text_to_image, owners),
        median_rank=median_rank(scores.text_to_image, is_match),
        num_videos=len(names),
        num_texts=len(texts),
        num_frames=num_frames,
        shortlist=shortlist,
    )


@dataclass(frozen=True)
class _Videos:
    """Frames of each video, read anew in each pass."""

    paths: list[Path]
    num_frames: int
    size_px: int

    def __iter__(self) -> Iterator[Tensor]:
        return (read_frames(path, self.num_frames, self.size_px) for path in self.paths)
