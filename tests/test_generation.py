"""Properties of decoding on a tiny random model with a small vocabulary."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from openblip.generation import Decoding, Generated, generate
from openblip.models.blip import Blip, BlipConfig
from openblip.models.context import Context
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, dec=8, enc=9)
CONFIG = BlipConfig(
    vision=VisionConfig(
        image_size_px=16, patch_size_px=8, width=16, num_layers=1, num_heads=2, init_std=0.5
    ),
    text=MedConfig(
        vocab_size=10, width=12, num_layers=1, num_heads=2, ffn_width=24, max_positions=24,
        context_width=16, init_std=0.5, roles=frozenset({"decode"}),
    ),
    tokens=TOKENS,
    embedding_width=8,
)  # fmt: skip
PROMPT = [5, 6]
NUM_IMAGES = 4
DECODINGS = {
    "greedy": Decoding(method="greedy", min_tokens=0, max_tokens=8),
    "beam": Decoding(method="beam", num_beams=3, min_tokens=0, max_tokens=8),
    "nucleus": Decoding(method="nucleus", min_tokens=0, max_tokens=8),
}


@pytest.fixture(scope="module")
def blip() -> Blip:
    torch.manual_seed(3)
    return Blip(CONFIG).eval()


@pytest.fixture(scope="module")
def context(blip: Blip) -> Context:
    images = 2 * torch.randn(NUM_IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return blip.project_context(blip.encode_image(images))


def decode(
    blip: Blip,
    context: Context,
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
    num: int = 1,
) -> list[list[Generated]]:
    return generate(
        blip,
        context,
        prompt_ids=PROMPT,
        tokens=TOKENS,
        decoding=decoding,
        seeds=range(context.num_images) if seeds is None else seeds,
        captions_per_image=num,
    )


def ids(captions: list[list[Generated]]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in several] for several in captions]


@torch.no_grad()
def all_texts(blip: Blip, one: Context, max_tokens: int) -> dict[tuple[int, ...], float]:
    """Return the log-probability of everything that can be written, [SEP] where it ended early."""
    logs = {}
    words = [token for token in range(CONFIG.text.vocab_size) if token != TOKENS.sep]
    for length in range(max_tokens + 1):
        for text in itertools.product(words, repeat=length):
            end = (TOKENS.sep,) if length < max_tokens else ()
            row = torch.tensor([[TOKENS.dec, *PROMPT, *text, *end]])
            own = blip.decode(row, torch.ones_like(row), one).log_softmax(dim=-1)[0]
            steps = range(len(PROMPT), row.shape[1] - 1)
            logs[(*text, *end)] = sum(float(own[t, row[0, t + 1]]) for t in steps)
    return logs


def test_one_beam_is_greedy(blip: Blip, context: Context) -> None:
    beam = replace(DECODINGS["beam"], num_beams=1)
    assert ids(decode(blip, context, beam)) == ids(decode(blip, context, DECODINGS["greedy"]))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_text(
    blip: Blip, context: Context, length_penalty: float
) -> None:
    decoding = Decoding(num_beams=90, min_tokens=0, max_tokens=2, length_penalty=length_penalty)
    for image, [caption] in enumerate(decode(blip, context, decoding)):
        logs = all_texts(blip, context.select(torch.tensor([image])), 2)
        best = max(logs, key=lambda text: logs[text] / len(text) ** length_penalty)
        end = (TOKENS.sep,) if caption.is_finished else ()
        assert caption.token_ids + end == best


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_an_image_alone_gets_the_caption_that_it_gets_in_a_batch(
    blip: Blip, context: Context, decoding: Decoding
) -> None:
    together = ids(decode(blip, context, decoding, seeds=[7, 8, 9, 10]))
    for image in range(NUM_IMAGES):
        one = context.select(torch.tensor([image]))
        assert ids(decode(blip, one, decoding, seeds=[7 + image])) == [together[image]]
    assert len({text for [text] in together}) > 1


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_lengths_are_obeyed(blip: Blip, context: Context, decoding: Decoding) -> None:
    for low, high in ((0, 1), (4, 4), (3, 6), (6, 8)):
        limited = replace(decoding, min_tokens=low, max_tokens=high)
        for [caption] in decode(blip, context, limited):
            num_generated = len(caption.token_ids) + caption.is_finished
            assert num_generated <= high
            assert low <= num_generated
            assert TOKENS.sep not in caption.token_ids
            assert len(caption.log_probabilities) == num_generated
            assert caption.is_finished or num_generated == high


def test_the_seed_alone_fixes_what_is_drawn(blip: Blip, context: Context) -> None:
    nucleus = replace(DECODINGS["nucleus"], top_p=1.0, temperature=2.0)
    one = context.select(torch.tensor([0, 0, 0]))
    a, b, c = ids(decode(blip, one, nucleus, seeds=[5, 5, 6]))
    assert a == b
    assert a != c
    torch.manual_seed(99)
    assert ids(decode(blip, one, nucleus, seeds=[5, 5, 6])) == [a, b, c]


def test_several_captions_differ_and_the_first_is_that_of_one(blip: Blip, context: Context) -> None:
    nucleus = replace(DECODINGS["nucleus"], top_p=1.0, temperature=2.0)
    one, several = (ids(decode(blip, context, nucleus, num=num)) for num in (1, 4))
    assert [captions[:1] for captions in several] == one
    assert all(len(set(captions)) > 1 for captions in several)


def test_beams_come_best_first(blip: Blip, context: Context) -> None:
    for captions in decode(blip, context, DECODINGS["beam"], num=3):
        scores = [caption.mean_log_probability for caption in captions]
        assert len(set(ids([captions])[0])) == 3
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("method", "num", "message"),
    [("greedy", 2, "gives 1 to 1"), ("beam", 4, "gives 1 to 3"), ("nucleus", 0, "1 to any")],
)
def test_more_captions_than_the_method_has_are_refused(
    blip: Blip, context: Context, method: str, num: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decode(blip, context, DECODINGS[method], num=num)


def test_seeds_must_fit_the_images(blip: Blip, context: Context) -> None:
    with pytest.raises(ValueError, match="3 seeds for 4 images"):
        decode(blip, context, DECODINGS["greedy"], seeds=[1, 2, 3])


def test_a_tiny_nucleus_is_greedy(blip: Blip, context: Context) -> None:
    nucleus = replace(DECODINGS["nucleus"], top_p=1e-6)
    assert ids(decode(blip, context, nucleus)) == ids(decode(blip, context, DECODINGS["greedy"]))
    top = replace(DECODINGS["nucleus"], top_k=1, top_p=1.0)
    assert ids(decode(blip, context, top)) == ids(decode(blip, context, DECODINGS["greedy"]))


def test_a_repetition_penalty_makes_repeats_rarer(blip: Blip, context: Context) -> None:
    for decoding in DECODINGS.values():
        long = replace(decoding, min_tokens=8)
        repeats = [
            sum(len(one.token_ids) - len(set(one.token_ids)) for [one] in captions)
            for captions in (
                decode(blip, context, long),
                decode(blip, context, replace(long, repetition_penalty=5.0)),
            )
        ]
        assert repeats[1] < repeats[0]


class Markov:
    """A decoder whose next token depends on the last one alone, by a table of probabilities."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        self.logits = torch.full((CONFIG.text.vocab_size,) * 2, -30.0)
        for last, following in table.items():
            for token, probability in following.items():
                self.logits[last, token] = torch.tensor(probability).log()

    def new_decoder_cache(self) -> "Markov":
        return self

    def reorder(self, rows: torch.Tensor) -> None:
        pass

    def decode_step(self, token_ids: torch.Tensor, cache: object, context: Context) -> torch.Tensor:
        return self.logits[token_ids[:, -1]]


def test_beam_search_goes_on_while_a_longer_text_may_win(context: Context) -> None:
    """Per token, a certain end makes `3 4` better than the two texts that end before it."""
    sep = TOKENS.sep
    decoder = Markov({PROMPT[-1]: {sep: 0.5, 3: 0.499}, 3: {4: 0.7, sep: 0.3}, 4: {sep: 1.0}})
    decoding = Decoding(num_beams=2, min_tokens=0, max_tokens=6)
    one = context.select(torch.tensor([0]))
    [[caption]] = generate(
        decoder,  # type: ignore[arg-type]
        one,
        prompt_ids=PROMPT,
        tokens=TOKENS,
        decoding=decoding,
        seeds=[0],
    )
    assert caption.token_ids == (3, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "num_beams 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_k": -1}, "top_k -1"),
        ({"temperature": 0.0}, "above 0"),
        ({"repetition_penalty": 0.0}, "above 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9"),
        ({"max_tokens": 0, "min_tokens": 0}, "at least one token"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**values)


@pytest.mark.parametrize("method", DECODINGS)
def test_images_that_leave_the_batch_change_no_caption(
    blip: Blip, context: Context, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their captions end at different steps; leaving at once or only together gives the same."""
    decoding = replace(DECODINGS[method], max_tokens=16)
    num_rows = []
    for bias in (0.0, 1.0, 2.0, 3.0):
        eager = copy.deepcopy(blip)
        with torch.no_grad():
            eager.text.lm_head.bias[TOKENS.sep] += bias
        together, leaving = both_ways(eager, context, decoding, monkeypatch)
        num_rows.append((sum(together), sum(leaving)))
    assert all(leaving <= together for together, leaving in num_rows)
    assert any(leaving < together for together, leaving in num_rows)


def both_ways(
    blip: Blip, context: Context, decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """Decode with images that leave together and at once; return the rows of every step."""
    found = {}
    for parts in (1, 100):
        monkeypatch.setattr("openblip.generation_batch.LEAVING_PARTS", parts)
        rows: list[int] = []
        step = blip.decode_step

        def counted(token_ids, cache, context, step=step, rows=rows):
            rows.append(len(token_ids))
            return step(token_ids, cache, context)

        monkeypatch.setattr(blip, "decode_step", counted)
        found[parts] = decode(blip, context, decoding, seeds=range(NUM_IMAGES)), rows
        monkeypatch.setattr(blip, "decode_step", step)
    together, leaving = found[1], found[100]
    for one, other in zip(together[0], leaving[0], strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in other]
        assert one[0].log_probabilities == pytest.approx(other[0].log_probabilities, abs=1e-5)
    assert together[1][0] == leaving[1][0] == NUM_IMAGES  # the prefix is read once per image
    return [together[1], leaving[1]]
