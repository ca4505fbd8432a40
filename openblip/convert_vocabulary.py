"""The vocabularies that lie beside foreign weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from openblip.tokenizer import Tokenizer


def read_vocabulary(vocabulary: Path | None, folder: Path, names: Sequence[str]) -> Tokenizer:
    """Build from a vocabulary; [DEC] and [ENC] come to its end where it lacks them.

    names  of the files in `folder` of which the first is taken where no vocabulary is given
    Raises ValueError if there is none, or none that fits.
    """
    if vocabulary is None:
        vocabulary = next((folder / name for name in names if (folder / name).is_file()), None)
    if vocabulary is None:
        raise ValueError(
            f"{folder} holds no {' or '.join(names)}: give the model's vocabulary, of the released "
            "models the vocab.txt of bert-base-uncased"
        )
    if not vocabulary.is_file():
        raise ValueError(f"no vocabulary at {vocabulary}")
    if vocabulary.suffix == ".json":
        words = words_of(vocabulary)
    else:
        # Not `splitlines`: it would also break at separators that are words of some vocabularies.
        words = vocabulary.read_text("utf-8").rstrip("\n").split("\n")
    try:
        return Tokenizer.from_vocabulary(words)
    except ValueError as error:
        raise ValueError(f"{vocabulary}: {error}") from error


def words_of(path: Path) -> list[str]:
    """Return the words of a `tokenizer.json`, added ones too, in the order of their ids.

    The rest of the file is built anew, for it may hold padding and truncation of some other use.
    Raises ValueError if it is no lower-casing WordPiece.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        ids = values["model"]["vocab"] | {t["content"]: t["id"] for t in values["added_tokens"]}
        is_lower = (values["normalizer"] or {}).get("lowercase", False)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer: {error!r}") from error
    if values["model"].get("type", "WordPiece") != "WordPiece" or not is_lower:
        raise ValueError(f"{path} is no lower-casing WordPiece, which BLIP uses")
    words = sorted(ids, key=ids.__getitem__)
    if [ids[word] for word in words] != list(range(len(words))):
        raise ValueError(f"{path}: the ids do not count from 0 to {len(words) - 1}")
    return words
