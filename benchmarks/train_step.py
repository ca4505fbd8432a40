"""One pre-training step of openblip beside the plain one on transformers' modules, interleaved.

    python benchmarks/train_step.py [--batch-sizes 8 16] [--precisions float32 bfloat16]
                                    [--rounds 5] [--json FILE]

Both have the same weights, dropout and captions of 13 tokens on average, and both count the
optimizer, the momentum average and the queue. Before a time is taken, the two must agree without
dropout: losses to 1e-5 relative, gradients to 1e-4 of their largest value. The median of the ratios
of neighbouring steps is what counts, for machines drift. Peak memory is that of a process which
takes three steps of one of the two.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from plain_step import PlainStep
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openblip.batching import bytes_of
from openblip.data.batches import ImageTextBatch
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.pretrain import ObjectiveRecipe, PretrainStep
from openblip.training.loop import StepOutput
from openblip.training.optim import OptimizerRecipe, build_optimizer

TOKENS = SpecialTokens(pad=0, cls=101, sep=102, dec=30522, enc=30523)
MAX_TOKENS, MEAN_TOKENS, SPREAD_TOKENS = 30, 13, 3
WEIGHT = 0.4

Side = Literal["openblip", "plain"]
Take = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """What was measured: seconds of a step, the median ratio, memory, and work done.

    *_peak_bytes    resident memory of a process beyond that before its model was made
    *_share         of the machine's matrix-product peak that the step's own products reach
    """

    precision: str
    batch_size: int
    openblip_s: float
    plain_s: float
    ratio: float
    openblip_peak_bytes: int
    plain_peak_bytes: int
    openblip_flops: int
    plain_flops: int
    openblip_share: float
    plain_share: float


def build() -> PretrainStep:
    """Return openblip's step at base size with the paper's queue."""
    torch.manual_seed(0)
    vision, text = VisionConfig(), MedConfig()
    return PretrainStep(
        Blip(BlipConfig(vision, text, TOKENS)), ObjectiveRecipe(soft_target_weight=WEIGHT)
    )


def draw_batch(batch_size: int, *, is_trimmed: bool) -> ImageTextBatch:
    """Draw images and captions; trimmed to the longest, or of MAX_TOKENS."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randn(batch_size, generator=generator) * SPREAD_TOKENS + MEAN_TOKENS
    lengths = lengths.round().long().clamp(4, MAX_TOKENS)
    length = int(lengths.max()) if is_trimmed else MAX_TOKENS
    ids = torch.randint(1000, 30000, (batch_size, MAX_TOKENS), generator=generator)[:, :length]
    places = torch.arange(length)
    mask = (places < lengths[:, None]).long()
    ids = torch.where(places == lengths[:, None] - 1, TOKENS.sep, ids * mask)
    ids[:, 0] = TOKENS.cls
    return ImageTextBatch(
        images=torch.randn(batch_size, 3, 224, 224, generator=generator),
        token_ids=ids,
        text_mask=mask,
        image_ids=torch.arange(batch_size),
        text_ids=torch.arange(batch_size),
        keys=tuple(map(str, range(batch_size))),
    )


def autocast(precision: str) -> AbstractContextManager[object]:
    if precision == "bfloat16":
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def openblip_take(step: PretrainStep, batch_size: int, precision: str) -> Take:
    """Return what one iteration of `training.loop.fit` does."""
    optimizer = build_optimizer(step, OptimizerRecipe())
    batch = draw_batch(batch_size, is_trimmed=True)
    step.train()

    def take() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            output: StepOutput = step(batch, 0)
        output.total.backward()
        optimizer.step()
        step.after_optimizer_step(output)

    return take


def plain_take(step: PlainStep, batch_size: int, precision: str) -> Take:
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.05)
    batch = draw_batch(batch_size, is_trimmed=False)
    step.train()

    def take() -> None:
        optimizer.zero_grad()
        with autocast(precision):
            losses = step(batch)
        sum(losses).backward()
        optimizer.step()
        step.after_optimizer_step()

    return take


def check_equal(ours: PretrainStep, plain: PlainStep, batch_size: int) -> None:
    """Compare losses and gradients without dropout, the most likely negative drawn each time."""
    ours.eval()
    plain.eval()
    with patch("torch.multinomial", lambda weights, *_, **__: weights.argmax(-1, keepdim=True)):
        theirs = plain(draw_batch(batch_size, is_trimmed=False))
        output = ours(draw_batch(batch_size, is_trimmed=True), 0)
    sum(theirs).backward()
    output.total.backward()
    for name, value in zip(("itc", "itm", "lm"), theirs, strict=True):
        torch.testing.assert_close(output.measures[name], value.detach(), rtol=1e-5, atol=0)
    blip, text = ours.blip, plain.text
    pairs = {
        "patches": (blip.vision.patch_weight, plain.vision.embeddings.patch_embedding.weight),
        "words": (blip.text.word_embedding.weight, text.embeddings.word_embeddings.weight),
        "image projection": (blip.image_projection.weight, plain.image_projection.weight),
        "first feed-forward": (
            blip.text.layers[0].up.weight,
            text.encoder.layer[0].intermediate.dense.weight,
        ),
        "temperature": (blip.temperature, plain.temperature),
    }
    for name, (mine, other) in pairs.items():
        assert mine.grad is not None, name
        assert other.grad is not None, name
        bound = 1e-4 * float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=bound, msg=name)
    for model in (ours, plain):
        model.zero_grad(set_to_none=True)


def count_flops(take: Take) -> int:
    """Count a step's products, forward and backward; fused attention as plain products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        take()
    return int(counter.get_total_flops())


def matmul_peak(precision: str, size: int = 4096) -> float:
    """Return the FLOP/s of the machine's best of some square products."""
    a: Tensor = torch.randn(size, size, dtype=getattr(torch, precision))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def peak_bytes(side: Side, batch_size: int, precision: str) -> int:
    """Take three steps in a process of its own and return how far its memory grew."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (side, batch_size, precision))


def _peak_here(side: Side, batch_size: int, precision: str) -> int:
    before = _most_resident_bytes()
    step = build()
    if side == "openblip":
        take = openblip_take(step, batch_size, precision)
    else:
        take = plain_take(PlainStep(step, WEIGHT), batch_size, precision)
        del step
    for _ in range(3):
        take()
    return _most_resident_bytes() - before


def _most_resident_bytes() -> int:
    """Read Linux's own count: getrusage's begins with the parent's."""
    return bytes_of("VmHWM", Path("/proc/self/status"))


def measure(batch_size: int, precision: str, rounds: int) -> Row:
    ours = build()
    plain = PlainStep(ours, WEIGHT)
    check_equal(ours, plain, batch_size)
    takes = {
        "openblip": openblip_take(ours, batch_size, precision),
        "plain": plain_take(plain, batch_size, precision),
    }
    flops = {side: count_flops(take) for side, take in takes.items()}
    seconds: dict[str, list[float]] = {side: [] for side in takes}
    for _ in range(rounds):
        for side, take in takes.items():
            start = time.perf_counter()
            take()
            seconds[side].append(time.perf_counter() - start)
    del takes, ours, plain
    median = {side: statistics.median(values) for side, values in seconds.items()}
    peak = matmul_peak(precision)
    return Row(
        precision=precision,
        batch_size=batch_size,
        openblip_s=median["openblip"],
        plain_s=median["plain"],
        ratio=statistics.median(
            theirs / mine
            for mine, theirs in zip(seconds["openblip"], seconds["plain"], strict=True)
        ),
        openblip_peak_bytes=peak_bytes("openblip", batch_size, precision),
        plain_peak_bytes=peak_bytes("plain", batch_size, precision),
        openblip_flops=flops["openblip"],
        plain_flops=flops["plain"],
        openblip_share=flops["openblip"] / median["openblip"] / peak,
        plain_share=flops["plain"] / median["plain"] / peak,
    )


def main(batch_sizes: Sequence[int], precisions: Sequence[str], rounds: int) -> list[Row]:
    print("| precision | batch | plain, s | openblip, s | ratio | peak GiB | TFLOP | of peak |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for precision in precisions:
        for batch_size in batch_sizes:
            row = measure(batch_size, precision, rounds)
            print(
                f"| {row.precision} | {row.batch_size} | {row.plain_s:.2f} | {row.openblip_s:.2f} "
                f"| {row.ratio:.2f} "
                f"| {row.plain_peak_bytes / 2**30:.1f} -> {row.openblip_peak_bytes / 2**30:.1f} "
                f"| {row.plain_flops / 1e12:.2f} -> {row.openblip_flops / 1e12:.2f} "
                f"| {row.plain_share:.0%} -> {row.openblip_share:.0%} |",
                flush=True,
            )
            rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    rows = main(arguments.batch_sizes, arguments.precisions, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
