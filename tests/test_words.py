import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openblip.generation_batch import Generated
from openblip.results import WrittenCaption
from openblip.tokenizer import BASE_TOKENS, BLIP_TOKENS, Tokenizer
from openblip.words import Word, WordStream, flags_of, is_repetitive, words_of

# Pieces that the clean-up joins, in every order that a model may write them.
PIECES = ["cat", "do", "n", "t", "'", "s", "m", ".", ",", "!", "a", "##s", "##ing", "##'", "n't"]
TOKENIZER = Tokenizer.from_vocabulary([*BASE_TOKENS, *PIECES, *BLIP_TOKENS])


def generated(*pieces: str, probability: float = 0.5, is_finished: bool = False) -> Generated:
    ids = [TOKENIZER.encode(piece)[1] for piece in pieces if not piece.startswith("##")]
    assert len(ids) == len(pieces)
    return Generated(tuple(ids), (math.log(probability),) * len(ids), is_finished)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=12))
def test_words_are_the_text_and_every_piece_belongs_to_one(ids: list[int]) -> None:
    words = TOKENIZER.words(ids)
    assert " ".join(text for text, _ in words) == TOKENIZER.decode(ids)
    special = {TOKENIZER.encode("[UNK]")[1], *(vars(TOKENIZER.special).values())}
    special.add(BASE_TOKENS.index("[MASK]"))
    kept = [place for place, token in enumerate(ids) if token not in special]
    assert [place for _, places in words for place in places] == kept


@given(
    st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=12),
    st.booleans(),
    st.integers(0, 12),
)
def test_words_that_were_told_stay(ids: list[int], is_finished: bool, most: int) -> None:
    """However a caption goes on, what was told of it is what is in it."""
    told: list[str] = []

    def on_word(image: int, word: Word) -> bool:
        told.append(word.text)
        return len(told) != most

    stream = WordStream(TOKENIZER, on_word)
    follow = stream.follower(5)
    logs = tuple(-0.1 * place for place in range(len(ids)))
    goes_on = True
    for length in range(1, len(ids) + 1):
        so_far = Generated(tuple(ids[:length]), logs[:length], False)
        if not (goes_on := follow(2, so_far)):
            break
    whole = Generated(tuple(ids), logs, is_finished) if goes_on else so_far
    [[cut]] = stream.finish(7, [[whole]])
    assert [text for text, _ in TOKENIZER.words(cut.token_ids)] == told
    if len(told) == len(TOKENIZER.words(ids)):
        assert cut.log_probabilities == logs or not goes_on
    if cut != whole:
        assert (len(told), cut.is_finished) == (most, False)
        assert cut.log_probabilities == logs[: len(cut.token_ids)]


def test_a_batch_that_is_begun_anew_tells_no_word_twice() -> None:
    told: list[str] = []
    stream = WordStream(TOKENIZER, lambda image, word: told.append(word.text) or True)
    for _ in range(2):
        for length in range(1, 4):
            stream.follow(0, generated(*["cat", "a", "do"][:length]), is_last=False)
    stream.finish(0, [[generated("cat", "a", "do", is_finished=True)]])
    assert told == ["cat", "a", "do"]


def test_a_word_is_as_probable_as_its_pieces_in_a_row() -> None:
    logs = tuple(math.log(probability) for probability in (0.5, 0.5, 0.8, 0.9))
    written = Generated(tuple(TOKENIZER.encode("cat's a")[1:-1]), logs, False)
    cats, a = words_of(TOKENIZER, written)
    assert (cats.text, cats.probability) == ("cat's", pytest.approx(0.2))
    assert (a.text, a.probability) == ("a", pytest.approx(0.9))
    caption = WrittenCaption.of(written, TOKENIZER)
    assert (caption.text, caption.words, caption.flags) == ("cat's a", (cats, a), ())


@pytest.mark.parametrize(
    "text",
    [
        "a cat cat on a mat", "a cat a cat", "on the mat. on the mat", "red , red",
        "a red cat, a red dog and a red bird", "a man in a train in a train station",
    ],
)  # fmt: skip
def test_repetition(text: str) -> None:
    assert is_repetitive(text.split())


@pytest.mark.parametrize(
    "text",
    [
        "", "cat", "a red circle above a red square", "a man and a woman on a bench",
        "a cell phone on a table next to a cell phone",
    ],
)  # fmt: skip
def test_what_people_say_is_no_repetition(text: str) -> None:
    assert not is_repetitive(text.split())


def test_low_confidence() -> None:
    sure, unsure = Word("cat", 0.9), Word("okapi", 0.04)
    assert flags_of([sure], math.log(0.9)) == ()
    assert flags_of([sure, unsure], math.log(0.9)) == ("low_confidence",)
    assert flags_of([sure], math.log(0.24)) == ("low_confidence",)
    assert flags_of([unsure, unsure], math.log(0.04)) == ("repetition", "low_confidence")
    assert flags_of([], 0.0) == ()
