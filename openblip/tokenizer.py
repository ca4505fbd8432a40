"""WordPiece with BLIP's two extra tokens: [DEC] opens what is decoded, [ENC] a judged pair.

Letters: B texts, L tokens.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from openblip.data.sinks import write_bytes_atomically
from openblip.models.text import SpecialTokens

MAX_TEXT_TOKENS = 35
"""Of a text that is compared, judged or asked, [CLS] and [SEP] included (BLIP's recipes)."""
BASE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BLIP_TOKENS = ("[DEC]", "[ENC]")

# In this order, as the original's BERT tokenizer joins punctuation and English contractions; the
# clean-up of `tokenizers` leaves the apostrophe of "cat ' s" alone.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True)
class TokenBatch:
    """token_ids, text_mask (B, L) int64, mask 1 = real token; num_truncated texts were cut."""

    token_ids: Tensor
    text_mask: Tensor
    num_truncated: int


class Tokenizer:
    """Lower-casing BERT WordPiece. `special` holds the ids that a model must know."""

    def __init__(self, raw: RawTokenizer) -> None:
        found = {t: raw.token_to_id(t) for t in (*BASE_TOKENS[:4], *BLIP_TOKENS)}
        ids = {token: number for token, number in found.items() if number is not None}
        if len(ids) < len(found):
            raise ValueError(f"the vocabulary lacks {', '.join(sorted(set(found) - set(ids)))}")
        self._raw = raw
        self.special = SpecialTokens(
            pad=ids["[PAD]"], cls=ids["[CLS]"], sep=ids["[SEP]"], dec=ids["[DEC]"], enc=ids["[ENC]"]
        )
        self._skipped = {raw.token_to_id(t) for t in (*BASE_TOKENS, *BLIP_TOKENS)}
        self.vocab_size = raw.get_vocab_size()

    @classmethod
    def from_vocabulary(cls, words: Sequence[str]) -> "Tokenizer":
        """Build from a BERT vocabulary in the order of its ids; adds [DEC] and [ENC] at its end.

        Raises ValueError for repeated words or missing special tokens.
        """
        ids = {word: index for index, word in enumerate(words)}
        if len(ids) != len(words):
            raise ValueError("the vocabulary repeats words")
        for token in BLIP_TOKENS:
            ids.setdefault(token, len(ids))
        return cls(_wordpiece(models.WordPiece(ids, unk_token="[UNK]")))

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int = 30_524, min_frequency: int = 2
    ) -> "Tokenizer":
        """Learn a WordPiece vocabulary of at most `vocab_size` from any texts, in any language.

        The same words, as often, give the same vocabulary.
        """
        raw = _wordpiece(models.WordPiece(unk_token="[UNK]"))
        counts = Counter(word for text in texts for word in _whole(text).split())
        # The trainer numbers inner letters in the order of its hash map, another one in every run,
        # and breaks ties between merges by these numbers; what is given as special, in our order.
        inner = {f"##{letter}" for word in counts for letter in _inner_letters(raw, word)}
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size - len(BLIP_TOKENS),
            min_frequency=min_frequency,
            special_tokens=[*BASE_TOKENS, *sorted(inner)],
            show_progress=False,
        )
        raw.train_from_iterator(counts.elements(), trainer)
        words = sorted(raw.get_vocab().items(), key=lambda item: item[1])
        return cls.from_vocabulary([word for word, _ in words])

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises ValueError if it is absent or lacks [DEC] or [ENC]."""
        if not Path(path).is_file():
            raise ValueError(f"no tokenizer at {path}")
        return cls(RawTokenizer.from_file(str(path)))

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, whole or not at all."""
        write_bytes_atomically(path, self._raw.to_str(pretty=True).encode())

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, [CLS] to [SEP]."""
        ids: list[int] = self._raw.encode(_whole(text)).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, max_tokens: int, pad_to: int | None = None
    ) -> TokenBatch:
        """Encode texts, cut to `max_tokens` with their [SEP] kept, padded to the longest.

        pad_to   pad to this length instead
        Raises ValueError if max_tokens leaves no room between [CLS] and [SEP].
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens {max_tokens} must be at least 3")
        rows = [encoding.ids for encoding in self._raw.encode_batch([*map(_whole, texts)])]
        cut = [
            row if len(row) <= max_tokens else [*row[: max_tokens - 1], self.special.sep]
            for row in rows
        ]
        length = pad_to or max((len(row) for row in cut), default=0)
        token_ids = torch.full((len(cut), length), self.special.pad)
        text_mask = torch.zeros_like(token_ids)
        for index, row in enumerate(cut):
            token_ids[index, : len(row)] = torch.tensor(row)
            text_mask[index, : len(row)] = 1
        num_truncated = sum(len(row) > max_tokens for row in rows)
        return TokenBatch(token_ids, text_mask, num_truncated)

    def words_of_text(self, text: str, *, max_tokens: int) -> list[tuple[str, list[int]]]:
        """Return the words of a text, each with the places of its tokens in `encode_batch`'s row.

        A word is what stands between spaces, as it was given. Those without a token, as they stand
        behind what is cut, are left out.
        """
        whole = _whole(text)
        encoding = self._raw.encode(whole)
        last = min(len(encoding.ids), max_tokens) - 1
        found = []
        for word in re.finditer(r"\S+", whole):
            places = [
                place
                for place, (start, _) in enumerate(encoding.offsets[1:last], 1)
                if word.start() <= start < word.end()
            ]
            if places:
                found.append((word.group(), places))
        return found

    def words(self, token_ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Return the words of what `decode` makes of ids, each with the places of its pieces.

        A word is what stands between spaces: "mat." is one, and so is "cat's". Special tokens
        belong to none.
        """
        kept = [(place, int(i)) for place, i in enumerate(token_ids) if int(i) not in self._skipped]
        # `decode` takes out spaces alone, so the letters of pieces and of words are the same.
        found: list[tuple[str, list[int]]] = []
        num_open = 0
        words = iter(self.decode(token_ids).split(" "))
        for number, (place, token) in enumerate(kept):
            if num_open == 0:
                word = next(words)
                found.append((word, []))
                num_open = len(word)
            found[-1][1].append(place)
            # The decoder leaves the marks of the first piece.
            piece = str(self._raw.id_to_token(token))
            num_open -= len(piece if number == 0 else piece.removeprefix("##"))
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens, spaces before punctuation removed."""
        kept = [int(i) for i in token_ids if int(i) not in self._skipped]
        text: str = self._raw.decode(kept)
        for spaced, closed in _CLEAN_UP:
            text = text.replace(spaced, closed)
        return text


def _whole(text: str) -> str:
    """Return a text that UTF-8 can hold: half a character, as cutting JSON leaves it, is U+FFFD.

    BERT's normalizer takes that out again.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _inner_letters(raw: RawTokenizer, word: str) -> set[str]:
    """Return the letters of a word that do not begin a piece of it."""
    pieces = raw.pre_tokenizer.pre_tokenize_str(raw.normalizer.normalize_str(word))
    return {letter for piece, _ in pieces for letter in piece[1:]}


def _wordpiece(model: models.WordPiece) -> RawTokenizer:
    raw = RawTokenizer(model)
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    vocabulary = raw.get_vocab()
    if "[SEP]" in vocabulary and "[CLS]" in vocabulary:
        raw.add_special_tokens([t for t in (*BASE_TOKENS, *BLIP_TOKENS) if t in vocabulary])
        raw.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
    return raw
