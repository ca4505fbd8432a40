from pathlib import Path

import pytest

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.report import capfilt_report, write_capfilt_report
from openblip.capfilt.report_words import NUM_REPEATED_CAPTIONS, RepeatedTexts, WordTally
from openblip.data.samples import Caption, CaptionSource
from tests.capfilt.judged import write_judged


def image(key: str, *rows: tuple[str, CaptionSource, str | None]) -> JudgedImage:
    captions = tuple(Caption(text, source, 0.5, drop_reason=why) for text, source, why in rows)
    return JudgedImage(key, captions, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two shards; 'a cat' is kept four times, by two writers and in two spellings."""
    first = [
        image("0", ("A cat.", "web", None), ("a cat on a mat", "synthetic", None)),
        image("1", ("a  CAT!", "web", None), ("...", "web", "empty")),
        image("2", ("buy one, get two", "web", "unmatched"), ("a cat", "synthetic", "duplicate")),
    ]
    second = [
        image("3", ("a cat", "synthetic", None), ("the dog", "web", None)),
        image("4", ("a cat", "synthetic", None), (" ".join(["very"] * 60), "web", None)),
    ]
    write_judged(tmp_path, "00000", first)
    return write_judged(tmp_path, "00001", second)


def counts(**numbers: int) -> list[int]:
    """Return 51 counts, from `words_2=3`."""
    return [numbers.get(f"words_{length}", 0) for length in range(51)]


def test_lengths_are_those_of_clean_captions(folder):
    lengths = capfilt_report(folder)["caption_lengths"]
    assert list(lengths) == ["web", "synthetic"]
    assert lengths["web"] == {
        "kept": {"counts": counts(words_2=3, words_50=1), "mean": 56 / 4, "median": 2},
        "dropped": {"counts": counts(words_0=1, words_4=1), "mean": 2, "median": 2},
        "mean": 60 / 6,
        "median": 2,
    }
    assert lengths["synthetic"] == {
        "kept": {"counts": counts(words_2=2, words_5=1), "mean": 3, "median": 2},
        "dropped": {"counts": counts(words_2=1), "mean": 2, "median": 2},
        "mean": 11 / 4,
        "median": 2,
    }


def test_a_median_lies_between_two_lengths(tmp_path):
    images = [image(str(n), (" ".join(["a"] * n), "web", None)) for n in (1, 2, 5, 9)]
    values = capfilt_report(write_judged(tmp_path, "00000", images))["caption_lengths"]["web"]
    assert values["median"] == 3.5
    assert values["mean"] == 17 / 4
    assert values["dropped"] == {"counts": counts(), "mean": None, "median": None}


def test_the_vocabulary_is_that_of_kept_captions(folder):
    vocabulary = capfilt_report(folder)["vocabulary"]
    assert vocabulary["web"] == {
        "num_captions": 4,
        "num_distinct_captions": 3,
        "share_distinct_captions": 3 / 4,
        "num_words": 56,
        "num_distinct_words": 5,
        "type_token_ratio": 5 / 56,
        "num_words_used_once": 2,
        "most_frequent": [
            {"word": "very", "count": 50},
            {"word": "a", "count": 2},
            {"word": "cat", "count": 2},
            {"word": "dog", "count": 1},
            {"word": "the", "count": 1},
        ],
    }
    assert vocabulary["synthetic"]["num_distinct_captions"] == 2
    assert vocabulary["synthetic"]["type_token_ratio"] == 4 / 9


def test_repeated_captions_are_counted_over_shards_and_writers(folder):
    report = write_capfilt_report(folder)
    assert report["repeated_captions"] == [{"text": "a cat", "count": 4}]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert '>a cat</th><td class="number">4</td>' in page
    assert "<title>50 words or more: 1</title>" in page
    assert "<title>1 word: 0</title>" in page


def test_the_most_repeated_captions_come_first_and_others_stay_out():
    tally = WordTally()
    images = [
        image(f"{number}_{time}", (f"caption {number:02}", "web", None))
        for number in range(14)
        for time in range(number)
    ]
    for one in images:
        tally.add(one)
    repeated = tally.repeated()
    texts = RepeatedTexts(repeated)
    for one in images:
        texts.add(one)
    assert texts.to_json() == [
        {"text": f"caption {number:02}", "count": number}
        for number in range(13, 13 - NUM_REPEATED_CAPTIONS, -1)
    ]


def test_captions_that_all_differ_and_sources_that_keep_nothing_are_told(tmp_path):
    rows = [("one", "web", None), ("two", "synthetic", "unmatched")]
    out = write_judged(tmp_path, "00000", [image("0", *rows)])
    report = write_capfilt_report(out)
    assert report["repeated_captions"] == []
    assert report["vocabulary"]["synthetic"] == {
        "num_captions": 0,
        "num_distinct_captions": 0,
        "share_distinct_captions": None,
        "num_words": 0,
        "num_distinct_words": 0,
        "type_token_ratio": None,
        "num_words_used_once": 0,
        "most_frequent": [],
    }
    assert "No kept caption is there twice." in (out / "report.html").read_text(encoding="utf-8")


def test_images_without_captions_have_a_report(tmp_path):
    report = write_capfilt_report(write_judged(tmp_path, "00000", [image("0")]))
    assert report["captions"] == report["caption_lengths"] == report["vocabulary"] == {}
