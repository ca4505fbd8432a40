"""Two processes that split a training (FSDP2) against the same two with whole copies (DDP).

Run by torchrun with a folder to write to; `test_parallel.py` does so.
"""

import itertools
import json
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.config import Recipe
from openblip.data.batches import ImageTextBatch
from openblip.data.position import Position
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.pretrain import ObjectiveRecipe, PretrainStep
from openblip.training import parallel
from openblip.training.alignment import AlignmentConfig
from openblip.training.best import Evaluation, Scores
from openblip.training.distributed import joined, local_part, whole_tensor, world
from openblip.training.loop import ProgressLine, fit
from openblip.training.optim import OptimizerRecipe
from openblip.training.state import SavingRecipe, TrainingState

NUM_STEPS = 4
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 1e-6, 1e-4


def new_step() -> PretrainStep:
    torch.manual_seed(3)
    config = BlipConfig(
        VisionConfig(16, 8, 16, 2, 2, drop_path=0.2, init_std=0.2),
        MedConfig(30, 16, 2, 2, 32, 16, 16, dropout=0.2, init_std=0.2),
        SpecialTokens(0, 2, 3, 5, 6),
        embedding_width=8,
    )
    objective = ObjectiveRecipe(alignment=AlignmentConfig(queue_size=6, momentum=0.9))
    return PretrainStep(Blip(config), objective)


class Batches:
    """Other random pairs on each rank."""

    def __init__(self) -> None:
        self.position = Position()

    def __iter__(self) -> Generator[ImageTextBatch]:
        for number in itertools.count(self.position.num_seen):
            generator = torch.Generator().manual_seed(1000 * world().rank + number)
            tokens = torch.randint(7, 30, (4, 6), generator=generator)
            images = torch.randn(4, 3, 16, 16, generator=generator)
            ids = torch.arange(4) + 4 * number
            self.position = replace(self.position, num_seen=number + 1)
            yield ImageTextBatch(images, tokens, torch.ones_like(tokens), ids, ids, ("a",))


class StoppedError(Exception):
    pass


def train(folder: Path, name: str, **options: Any) -> tuple[dict[str, Tensor], list[Any]]:
    torch.manual_seed(7)
    step, log = new_step(), folder / f"{name}.jsonl"
    recipe = OptimizerRecipe(lr=0.01, max_gradient_norm=0.5)
    fit(
        step, Batches(), recipe, num_steps=NUM_STEPS, title=name, log_path=log,
        accumulation_steps=2, **options,
    )  # fmt: skip
    world().wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return step.state_dict(), lines


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def check(folder: Path) -> None:
    ranks = world()
    parts: dict[str, int] = {}
    seen: dict[str, list[dict[str, Tensor]]] = {"Copied": [], "Seen": []}

    def gradients(replica: Any) -> dict[str, Tensor]:
        return {
            name: whole_tensor(parameter.grad).clone()
            for name, parameter in replica.trained.named_parameters()
            if parameter.grad is not None
        }

    def clip(replica: Any, max_norm: float) -> None:
        seen[type(replica).__name__].append(gradients(replica))
        clips[type(replica).__name__](replica, max_norm)
        seen[type(replica).__name__].append(gradients(replica))

    class Seen(parallel.Split):
        def spread(self) -> None:
            super().spread()
            parts["own"] = sum(local_part(p).numel() for p in self.trained.parameters())
            parts["all"] = sum(p.numel() for p in self.trained.parameters())

    clips = {"Copied": parallel.Copied.clip, "Seen": parallel.Split.clip}
    parallel.Split = Seen  # type: ignore[misc]
    for kind in (parallel.Copied, Seen):
        kind.clip = clip  # type: ignore[method-assign]
    copied, expected = train(folder, "ddp")
    split, lines = train(folder, "fsdp", parallel="fsdp")
    assert parts["own"] < 0.6 * parts["all"]
    # Adam divides a gradient by its own size: where that is rounding alone, so is the weight.
    print("weights differ by", largest_difference(copied, split))
    for kind, one, other in zip(
        ("gradients", "clipped gradients"), seen["Copied"][:2], seen["Seen"][:2], strict=True
    ):
        print(kind, "differ by", largest_difference(one, other))
        assert largest_difference(one, other) < GRADIENT_TOLERANCE
    assert largest_difference(seen["Seen"][0], seen["Seen"][1]) > 100 * GRADIENT_TOLERANCE
    differences = [
        abs(line[key] - other[key])
        for line, other in zip(lines, expected, strict=True)
        for key in line
    ]
    print("losses differ by", max(differences))
    assert max(differences) < LOSS_TOLERANCE

    recomputed, _ = train(folder, "ddp recomputed", is_recomputed=True)
    assert largest_difference(copied, recomputed) == 0.0
    recomputed, _ = train(folder, "recomputed", parallel="fsdp", is_recomputed=True)
    assert largest_difference(split, recomputed) == 0.0

    # Stopped behind its third step, it goes on from the second, and the best model is whole.
    advance = ProgressLine.advance

    def until(line: ProgressLine, num: int = 1, note: str = "") -> None:
        advance(line, num, note)
        if line.done == 3:
            raise StoppedError

    saving = SavingRecipe(every_steps=2, every_minutes=0.0)
    ProgressLine.advance = until  # type: ignore[method-assign]
    try:
        state = TrainingState(folder / "m.state", saving, Recipe())
        train(folder, "stopped", parallel="fsdp", state=state)
    except StoppedError:
        pass
    ProgressLine.advance = advance  # type: ignore[method-assign]
    step, kept = new_step(), []

    def measure() -> Scores:
        sizes = [p.numel() for p in step.parameters()]
        assert sum(sizes) == parts["all"]
        return Scores({}, float(len(kept)))

    evaluation = Evaluation(
        2, measure, lambda number, scores: kept.append((number, step.blip.state_dict()))
    )
    torch.manual_seed(99)
    fit(
        step, Batches(), OptimizerRecipe(lr=0.01, max_gradient_norm=0.5), num_steps=NUM_STEPS,
        title="goes on", log_path=folder / "stopped.jsonl", accumulation_steps=2, parallel="fsdp",
        state=TrainingState(folder / "m.state", saving, Recipe()), evaluation=evaluation,
    )  # fmt: skip
    assert largest_difference(split, step.state_dict()) == 0.0
    assert [number for number, _ in kept] == ([2, 4] if ranks.is_first else [])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as ranks:
        assert ranks.size == 2
        check(Path(sys.argv[1]))
        print(f"rank {ranks.rank} is done")
