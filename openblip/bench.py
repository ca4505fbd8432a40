"""What a machine gets out of a model: rates, and how near they come to the machine's limits.

Letters: B images, L tokens, R texts.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.batching import Encoded, bytes_of
from openblip.generation import Decoding
from openblip.inference import Engine
from openblip.kernels import Int8Linear, PackedLinear, Precision, is_default_library_slow, is_x86
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import TokenBatch, Tokenizer

NEW_TOKENS = 20
"""Tokens of every caption here, no less and no more: equal work, whatever the weights."""
PROMPT = "a picture of"
NUM_TEXTS, MEAN_TOKENS, SPREAD_TOKENS, FEWEST_TOKENS, MOST_TOKENS = 128, 13, 3, 6, 20
NUM_LOOPED = 8
NUM_WORDS = 30522
SEED = 42
PEAK_SECONDS = 0.5
WARM_AFTER_SECONDS = 5.0
INIT_STD = 0.05
"""Wide enough that no two tokens are equally likely by rounding."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """Something to do with a model. count is the number of `unit` that a run makes of it."""

    name: str
    unit: str
    count: int
    run: Run


@dataclass(frozen=True)
class Row:
    """What was measured of a work in a precision.

    seconds        median of the runs
    peer_seconds   the same of the peer; None without one
    ratio          median of the ratios of neighbouring runs, peer over ours; above 1 ours is faster
    rounds         runs of each; 0 if the time did not suffice, and nothing was measured then
    peak_bytes     resident memory at most, models of both included; None where it cannot be told
    """

    name: str
    unit: str
    precision: Precision
    count: int
    rounds: int
    seconds: float | None = None
    peer_seconds: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None

    @property
    def per_second(self) -> float | None:
        return None if self.seconds is None else self.count / self.seconds

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {**asdict(self), "per_second": self.per_second}


def random_model(size: str, image_size_px: int) -> tuple[Blip, Tokenizer]:
    """Return a model of random weights, `base` or `tiny`, with a vocabulary of made-up words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROMPT.split()]
    num_words = NUM_WORDS if size == "base" else 200
    words += [f"w{number}" for number in range(num_words - len(words))]
    tokenizer = Tokenizer.from_vocabulary(words)
    if size == "base":
        vision = VisionConfig(image_size_px=image_size_px, init_std=INIT_STD)
        text = MedConfig(vocab_size=tokenizer.vocab_size, init_std=INIT_STD)
    else:
        vision = VisionConfig(
            image_size_px=image_size_px, width=32, num_layers=2, num_heads=2, init_std=0.3
        )
        text = MedConfig(
            vocab_size=tokenizer.vocab_size, width=32, num_layers=2, num_heads=2, ffn_width=64,
            max_positions=64, context_width=32, init_std=0.3,
        )  # fmt: skip
    torch.manual_seed(SEED)
    config = BlipConfig(vision=vision, text=text, tokens=tokenizer.special)
    return Blip(config).eval(), tokenizer


def random_images(number: int, size_px: int) -> Tensor:
    """Return noise (B, 3, S, S) of the scale of prepared images."""
    return torch.randn(number, 3, size_px, size_px, generator=_generator())


def random_texts(tokenizer: Tokenizer, number: int = NUM_TEXTS) -> TokenBatch:
    """Return texts of 13 tokens on average, 6 to 20, as captions have; padded to the longest."""
    lengths = torch.empty(number).normal_(MEAN_TOKENS, SPREAD_TOKENS, generator=_generator())
    lengths = lengths.round().clamp(FEWEST_TOKENS, MOST_TOKENS).long()
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(5, tokenizer.vocab_size - 2, (number, longest), generator=_generator())
    ids = ids * mask
    ids[:, 0] = tokenizer.special.cls
    ids[torch.arange(number), lengths - 1] = tokenizer.special.sep
    return TokenBatch(ids, mask, 0)


def decoding_of(num_beams: int) -> Decoding:
    """Return greedy or beam search for NEW_TOKENS tokens."""
    return Decoding(
        method="greedy" if num_beams == 1 else "beam",
        num_beams=num_beams,
        min_tokens=NEW_TOKENS,
        max_tokens=NEW_TOKENS,
    )


def works(engine: Engine, judge: Engine) -> list[Work]:
    """Return what is measured.

    judge  the filter of CapFilt; its image encoder is its own, and shared in the last work alone
    """
    size_px = engine.image_size_px
    images = random_images(8, size_px)
    texts = random_texts(engine.tokenizer)
    pair = random_texts(engine.tokenizer, 16)
    looped = TokenBatch(texts.token_ids[:NUM_LOOPED], texts.text_mask[:NUM_LOOPED], 0)
    states = engine.encode(images[:1]).states

    def caption(number: int, num_beams: int) -> Run:
        return lambda: engine.caption(
            images[:number], decoding=decoding_of(num_beams), prompt=PROMPT
        )

    def judge_pairs(encoded: Encoded) -> None:
        for row in range(len(encoded)):
            part = TokenBatch(
                pair.token_ids[2 * row : 2 * row + 2], pair.text_mask[2 * row : 2 * row + 2], 0
            )
            judge.match_tokens(encoded[row : row + 1], part)

    def capfilt() -> None:
        engine.caption(images, decoding=decoding_of(1), prompt=PROMPT)
        judge_pairs(judge.encode(images))

    def capfilt_shared() -> None:
        encoded = engine.encode(images)
        engine.caption(encoded, decoding=decoding_of(1), prompt=PROMPT)
        judge_pairs(Encoded(encoded.states, judge.backend))

    return [
        Work("image encoder, batch 8", "images", 8, lambda: engine.encode(images)),
        Work("caption, batch 1, greedy", "captions", 1, caption(1, 1)),
        Work("caption, batch 1, beam 3", "captions", 1, caption(1, 3)),
        Work("caption, batch 8, greedy", "captions", 8, caption(8, 1)),
        Work("caption, batch 8, beam 3", "captions", 8, caption(8, 3)),
        Work(
            "ITM, 1 image x 128 texts, image to encode", "pairs", NUM_TEXTS,
            lambda: engine.match_tokens(engine.encode(images[:1]), texts),
        ),
        Work(
            "ITM, 1 image x 128 texts, states at hand", "pairs", NUM_TEXTS,
            lambda: engine.match_tokens(Encoded(states, engine.backend), texts),
        ),
        Work(
            "ITM, 1 image x 8 texts, encoded again for every text", "pairs", NUM_LOOPED,
            lambda: engine.match_tokens(engine.encode(images[:1]), looped),
        ),
        Work("ITC, 128 texts", "texts", NUM_TEXTS, lambda: engine.embed_texts(texts)),
        Work("CapFilt, batch 8, an image encoder each", "images", 8, capfilt),
        Work("CapFilt, batch 8, one image encoder", "images", 8, capfilt_shared),
    ]  # fmt: skip


def measure(
    ours: Sequence[Work],
    theirs: Mapping[str, Run],
    precision: Precision,
    *,
    rounds: int,
    deadline: float,
    on_row: Callable[[str], None],
) -> Iterator[Row]:
    """Measure works, interleaved with the peer's where it has one of that name.

    deadline  of time.monotonic(), after which no work begins: the row of one that is left out says
              0 rounds. What has begun is run twice at least
    on_row    called with a name before its work begins
    """
    for work in ours:
        on_row(f"{work.name}, {precision}")
        peer = theirs.get(work.name)
        if time.monotonic() > deadline:
            yield Row(work.name, work.unit, precision, work.count, 0)
            continue
        _reset_peak()
        own, other = [_seconds(work.run)], [] if peer is None else [_seconds(peer)]
        once = own[0] + sum(other)
        if once < WARM_AFTER_SECONDS:  # the first run of what is short is no measure
            own.clear()
            other.clear()
        while len(own) < 2 or (len(own) < rounds and time.monotonic() + once < deadline):
            own.append(_seconds(work.run))
            if peer is not None:
                other.append(_seconds(peer))
        yield Row(
            work.name, work.unit, precision, work.count, len(own), statistics.median(own),
            statistics.median(other) if other else None, ratio_of(own, other), _peak_bytes(),
        )  # fmt: skip


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return the median of the ratios of neighbouring runs, which does not see a machine drift."""
    if not theirs:
        return None
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def encoder_flops(config: VisionConfig) -> float:
    """Return operations of an image: two for every product of a weight, and attention's own."""
    positions, width = 1 + config.num_patches, config.width
    weights = (4 + 2 * config.mlp_ratio) * width**2 * config.num_layers
    patches = 3 * config.patch_size_px**2 * width * config.num_patches
    attention = 2 * positions**2 * width * config.num_layers
    return 2 * (positions * weights + patches + attention)


def decoder_bytes(config: MedConfig, precision: Precision) -> int:
    """Return bytes of weights that a decoding step reads."""
    own, seen = (4 + 2) * config.width**2, 2 * config.width * config.ffn_width
    weights = config.num_layers * (own + seen) + config.width * (config.vocab_size + config.width)
    return weights * {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[precision]


def product_rates(precision: Precision, rows: int, width: int) -> dict[str, float]:
    """Return operations a second of products (rows, width) x (width, 4 width), by their kernel."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    states = torch.randn(rows, width, generator=_generator()).to(dtype)
    weight = torch.randn(4 * width, width, generator=_generator()).to(dtype)
    kernels: dict[str, nn.Module | Run] = {}
    if precision == "int8":
        kernels["int8"] = Int8Linear(weight, None)
    else:
        kernels["plain"] = lambda: F.linear(states, weight)
        if is_x86():
            packed = PackedLinear(weight, None)
            packed.is_always_packed = True
            kernels["laid out"] = packed
    rates = {}
    with torch.no_grad():
        for name, kernel in kernels.items():
            run = (lambda k=kernel: k(states)) if isinstance(kernel, nn.Module) else kernel
            run()
            seconds: list[float] = []
            end = time.monotonic() + PEAK_SECONDS
            while time.monotonic() < end or len(seconds) < 3:
                seconds.append(_seconds(run))
            rates[name] = 2 * rows * width * 4 * width / min(seconds)
    return rates


def copy_bandwidth() -> float:
    """Return bytes a second that a copy reads, of an array beyond the cache."""
    source = torch.randn(1 << 26)
    target = torch.empty_like(source)
    target.copy_(source)
    return source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(5))


def step_seconds(engine: Engine) -> float:
    """Return seconds of a decoding step for one image, greedy: the slope over the length."""
    states = engine.encode(random_images(1, engine.image_size_px)).states
    encoded = Encoded(states, engine.backend, engine.backend.project_context(states))

    def seconds(tokens: int) -> float:
        decoding = Decoding(method="greedy", min_tokens=tokens, max_tokens=tokens)

        def run() -> None:
            engine.caption(encoded, decoding=decoding, prompt=PROMPT)

        run()
        return min(_seconds(run) for _ in range(3))

    return (seconds(24) - seconds(4)) / 20


def first_caption_seconds(engine: Engine, image: bytes) -> float:
    """Return seconds from an image file's bytes to its caption, beam search of 3."""

    def run() -> None:
        engine.caption([image], decoding=decoding_of(3), prompt=PROMPT)

    run()
    return statistics.median(_seconds(run) for _ in range(3))


def advice(rates: Mapping[Precision, Mapping[str, float]], chosen: Precision) -> list[str]:
    """Explain what `auto` takes on this machine, and warn where the rules do not fit it.

    rates   `product_rates` of one image's rows, by precision
    chosen  what `auto` takes
    """
    best = {precision: max(values.values()) for precision, values in rates.items()}
    told = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in best.items())
    lines = [f"auto takes {chosen} here: {told} at the products of one image"]
    exact: dict[Precision, float] = {n: rate for n, rate in best.items() if n != "int8"}
    fastest = max(exact, key=lambda name: exact[name])
    if exact[fastest] > 1.15 * exact.get(chosen, math.inf):
        lines.append(f"warning: {fastest} is faster here than {chosen}: ask for it by name")
    if "int8" in best and best["int8"] > best[fastest]:
        lines.append(
            "int8 is faster still; auto never takes it, for it changes some tokens of captions"
        )
    plain, laid = (rates.get("float32", {}).get(name) for name in ("plain", "laid out"))
    if plain is not None and laid is not None:
        is_slow = laid > 1.15 * plain
        if is_slow != is_default_library_slow():
            rule = "slow" if is_default_library_slow() else "fast"
            lines.append(
                f"warning: plain float32 products are taken for {rule} here, and run at "
                f"{plain / 1e9:,.0f} GFLOP/s, laid out at {laid / 1e9:,.0f}"
            )
    return lines


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _reset_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int | None:
    status = Path("/proc/self/status")
    return bytes_of("VmHWM", status) if status.exists() else None
