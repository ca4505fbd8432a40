"""Caption metrics against hand-worked cases and against the numbers of coco-caption."""

import gzip
import json
import tarfile
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest

from openblip.evaluation.caption_metrics import (
    CaptionScores,
    report_captions,
    score_captions,
)

COCO_NAMES = {
    "bleu_1": "Bleu_1",
    "bleu_2": "Bleu_2",
    "bleu_3": "Bleu_3",
    "bleu_4": "Bleu_4",
    "rouge_l": "ROUGE_L",
    "cider": "CIDEr",
}


def score(hypothesis: str, *references: str) -> CaptionScores:
    return score_captions({"image": hypothesis}, {"image": references})


def test_bleu_is_the_geometric_mean_of_precisions() -> None:
    scores = score("a brown dog runs", "a brown dog sits")
    assert scores.bleu_1 == pytest.approx(3 / 4)
    assert scores.bleu_2 == pytest.approx((3 / 4 * 2 / 3) ** (1 / 2))
    assert scores.bleu_3 == pytest.approx((3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert scores.bleu_4 == pytest.approx(0, abs=1e-3)


def test_bleu_clips_a_repeated_word_at_its_largest_count_in_one_reference() -> None:
    scores = score("dog dog dog dog", "dog and dog eat", "one dog eats now")
    assert scores.bleu_1 == pytest.approx(2 / 4)


def test_bleu_compares_with_the_closest_reference_length_and_the_shorter_on_a_tie() -> None:
    assert score("a dog", "a dog runs", "a dog runs very fast").bleu_1 == pytest.approx(
        exp(1 - 3 / 2)
    )
    assert score("a dog runs", "a dog", "a dog runs fast").bleu_1 == pytest.approx(1)


def test_bleu_of_a_set_pools_counts_over_images() -> None:
    hypotheses = {"one": "red dog", "two": "a cat on blue mat here"}
    references = {"one": ["red dog"], "two": ["the dog under old tree there"]}
    assert score_captions(hypotheses, references).bleu_1 == pytest.approx(2 / 8)


def test_rouge_l_weighs_recall_by_beta() -> None:
    precision, recall = 2 / 4, 2 / 3
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert score("a dog runs fast", "a dog sits").rouge_l == pytest.approx(expected)


def test_rouge_l_follows_order_and_lets_gaps_be() -> None:
    precision = recall = 3 / 4
    assert score("a dog runs fast", "a fast dog runs").rouge_l == pytest.approx(precision)
    assert recall == precision


def test_rouge_l_takes_precision_and_recall_from_different_references() -> None:
    # Precision 1 comes from the long reference, recall 1 from the short one.
    assert score("a dog runs", "a dog runs on green grass", "dog").rouge_l == pytest.approx(1)


def test_cider_of_equal_captions_is_ten() -> None:
    captions = {"one": "a red dog runs home", "two": "some blue cats sleep here"}
    scores = score_captions(captions, {image: [text] for image, text in captions.items()})
    assert scores.cider == pytest.approx(10)


def test_cider_weighs_overlap_length_and_missing_orders() -> None:
    report = report_captions(
        {"one": "red dog runs", "two": "green tree"},
        {"one": ["red dog"], "two": ["blue cat"]},
    )
    # All words have the same idf. Lengths differ by one bigram; orders 3 and 4 have no overlap.
    expected = 10 / 4 * (2 / sqrt(6) + 1 / sqrt(2)) * exp(-1 / (2 * 6**2))
    assert report.per_image["one"].cider == pytest.approx(expected)
    assert report.per_image["two"].cider == 0
    assert report.corpus.cider == pytest.approx(expected / 2)


def test_cider_counts_a_word_less_the_more_images_have_it() -> None:
    report = report_captions(
        {"one": "dog tree", "two": "x", "three": "x"},
        {"one": ["dog house", "big house"], "two": ["dog"], "three": ["cat"]},
    )
    common, rare = log(3 / 2), log(3)
    overlap = common**2 / (sqrt(common**2 + rare**2) * sqrt(common**2 + rare**2))
    assert report.per_image["one"].cider == pytest.approx(10 / 4 * overlap / 2)


def test_cider_clips_a_repeated_word() -> None:
    report = report_captions({"one": "dog dog", "two": "x"}, {"one": ["dog house"], "two": ["cat"]})
    assert report.per_image["one"].cider == pytest.approx(10 / 4 * 1 / (2 * sqrt(2)))


def test_an_empty_caption_scores_zero() -> None:
    report = report_captions(
        {"one": " . ", "two": "a cat"}, {"one": ["a dog runs"], "two": ["a cat"]}
    )
    assert all(value == pytest.approx(0) for value in report.per_image["one"].to_json().values())


def test_case_and_punctuation_do_not_count() -> None:
    references = {"one": ["a man's dog runs on grass"], "two": ["two cats"]}
    plain = score_captions({"one": "a man's dog runs", "two": "two cats"}, references)
    assert plain == score_captions({"one": 'A "man\'s" dog, runs!', "two": "Two cats."}, references)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="no captions"):
        score_captions({}, {})
    with pytest.raises(ValueError, match=r"1 image ids .*'two'"):
        score_captions({"one": "a"}, {"one": ["a"], "two": ["b"]})
    with pytest.raises(ValueError, match="'one'"):
        score_captions({"one": "a"}, {"one": []})
    with pytest.raises(ValueError, match="give a list"):
        score_captions({"one": "a"}, {"one": "a dog"})


def read_coco(folder: Path, name: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    results = json.loads((folder / f"{name}_results.json").read_text(encoding="utf-8"))
    hypotheses = {str(row["image_id"]): row["caption"] for row in results}
    references: dict[str, list[str]] = {image: [] for image in hypotheses}
    for row in json.loads((folder / f"{name}_refs.json").read_text(encoding="utf-8"))[
        "annotations"
    ]:
        if str(row["image_id"]) in references:
            references[str(row["image_id"])].append(row["caption"])
    return hypotheses, references


def expected_scores(folder: Path) -> dict[str, dict[str, Any]]:
    scores = json.loads((folder / "expected_scores.json").read_text(encoding="utf-8"))["scores"]
    assert isinstance(scores, dict)
    return scores


def test_scores_equal_those_of_coco_caption(shared: Path) -> None:
    folder = shared / "data" / "coco-eval"
    names = [path.name.removesuffix("_results.json") for path in folder.glob("*_results.json")]
    assert names
    for name in names:
        report = report_captions(*read_coco(folder, name))
        expected = expected_scores(folder)[name]
        assert len(report.per_image) == expected["images"]
        for ours, theirs in COCO_NAMES.items():
            assert getattr(report.corpus, ours) == pytest.approx(expected[theirs], abs=1e-9), name
        with gzip.open(folder / f"{name}_per_image.json.gz", "rt", encoding="utf-8") as file:
            per_image = json.load(file)["per_image"]
        for image, scores in report.per_image.items():
            for ours, theirs in COCO_NAMES.items():
                # The file holds six decimals.
                assert getattr(scores, ours) == pytest.approx(per_image[image][theirs], abs=6e-7)


def test_scores_of_flickr8k_equal_those_of_coco_caption(shared: Path) -> None:
    expected = expected_scores(shared / "data" / "coco-eval")["flickr8k_val_caption0_vs_rest"]
    hypotheses: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    with tarfile.open(shared / "data" / "photos" / "flickr8k-val-00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file is not None
                row = json.load(file)
                hypotheses[row["id"]], *references[row["id"]] = row["captions"]
    scores = score_captions(hypotheses, references)
    for ours, theirs in COCO_NAMES.items():
        assert getattr(scores, ours) == pytest.approx(expected[theirs], abs=1e-9)
