import json
from pathlib import Path

import pytest

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.report import capfilt_report, write_capfilt_report
from openblip.capfilt.report_agreement import NUM_DISAGREEMENTS, Disagreements, SimilarityTally
from openblip.data.samples import Caption
from tests.capfilt.judged import write_judged


def image(key: str, *captions: Caption) -> JudgedImage:
    return JudgedImage(key, captions, {})


def web(match: float | None, similarity: float | None) -> Caption:
    return Caption("a cat", "web", match, similarity)


def found(images: list[JudgedImage]) -> dict[str, list[tuple[str, float]]]:
    """Return the keys with their scores."""
    tally = SimilarityTally()
    for one in images:
        tally.add(one)
    disagreements = Disagreements(tally)
    for one in images:
        disagreements.add("shard", one)
    return {
        name: [(one["key"], pytest.approx(one["score"])) for one in several]
        for name, several in disagreements.to_json().items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two shards of four web captions; similarities have the percentiles 1/8 to 7/8."""
    write_judged(tmp_path, "00000", [image("low", web(0.9, -0.5)), image("fits", web(0.9, 0.7))])
    dropped = Caption("a <dog>", "web", 0.1, 0.3, drop_reason="unmatched")
    synthetic = Caption("a bird", "synthetic", 0.5, 0.9)
    return write_judged(
        tmp_path, "00001", [image("high", dropped, synthetic), image("bad", web(0.1, 0.1))]
    )


def test_the_worst_disagreements_are_told_with_both_scores(folder):
    report = write_capfilt_report(folder)
    high = report["disagreements"]["high_match_low_similarity"]
    low = report["disagreements"]["low_match_high_similarity"]
    assert high == [
        {
            "shard": "00000", "key": "low", "source": "web", "text": "a cat",
            "match_probability": 0.9, "similarity": -0.5, "similarity_percentile": 0.125,
            "score": 0.9 - 0.125, "drop_reason": None,
        },
        {
            "shard": "00000", "key": "fits", "source": "web", "text": "a cat",
            "match_probability": 0.9, "similarity": 0.7, "similarity_percentile": 0.875,
            "score": 0.9 - 0.875, "drop_reason": None,
        },
    ]  # fmt: skip
    assert [(one["key"], one["text"]) for one in low] == [("high", "a <dog>"), ("bad", "a cat")]
    assert low[0]["score"] == 0.1 - 0.625
    assert low[0]["drop_reason"] == "unmatched"
    # The synthetic caption is the only one of its source: its percentile is 0.5, its score 0.
    assert json.loads(json.dumps(report)) == report


def test_the_page_shows_them_with_pictures(folder):
    write_capfilt_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    section = page[page.index("ITC against ITM</h2>") :]
    section = section[: section.index("</section>")]
    assert section.count("data:image/png") == 4
    assert "match 0.90" in section
    assert "similarity -0.50" in section
    assert "above 12.5 % of web" in section
    assert "a &lt;dog&gt;" in section
    assert "dropped: unmatched" in section
    (folder.parent / "web" / "00000.tar").unlink()
    write_capfilt_report(folder)
    assert "The shard 00000.tar is gone." in (folder / "report.html").read_text(encoding="utf-8")


def test_only_the_worst_stay_the_first_of_equals_before_the_last():
    # 101 similarities, each alone in its bin but for the two lowest.
    images = [image(f"{n}", web(0.5, -1 + (n + 0.5) / 50)) for n in range(100)]
    result = found([*images, image("again", web(0.5, -1 + 0.5 / 50))])
    high, low = result["high_match_low_similarity"], result["low_match_high_similarity"]
    assert [key for key, _ in high] == ["0", "again", "1", "2", "3", "4"]
    assert [key for key, _ in low] == [f"{99 - n}" for n in range(NUM_DISAGREEMENTS)]
    assert high[0][1] == 0.5 - 1 / 101
    assert low[0][1] == 0.5 - 100.5 / 101


def test_captions_without_a_score_are_passed_but_count_in_the_percentile():
    images = [image("unjudged", web(None, -0.9)), image("old", web(0.9, None))]
    assert found([*images, image("both", web(1.0, 0.2))]) == {
        "high_match_low_similarity": [("both", 1 - 0.75)],
        "low_match_high_similarity": [],
    }
    assert found(images) == {"high_match_low_similarity": [], "low_match_high_similarity": []}


@pytest.mark.parametrize("similarity", [-1.0000001, -1.0, 1.0, 1.0000001])
def test_similarities_at_the_ends_are_counted(similarity):
    assert found([image("k", web(1.0, similarity))])["high_match_low_similarity"] == [("k", 0.5)]


def test_a_similarity_that_is_not_a_number_is_refused(tmp_path):
    out = write_judged(tmp_path, "00000", [image("k", web(0.5, float("nan")))])
    with pytest.raises(ValueError, match="image k: its similarity is NaN"):
        capfilt_report(out)


def test_scores_that_are_not_there_are_said_to_be_missing(tmp_path):
    out = write_judged(tmp_path, "00000", [image("k", web(0.5, None))])
    write_capfilt_report(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "No caption has both a match probability and a similarity." in page
