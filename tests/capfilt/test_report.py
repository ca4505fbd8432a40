import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from openblip.capfilt.bootstrap import BootstrapData
from openblip.capfilt.bootstrap_report import write_bootstrap_report
from openblip.capfilt.keep import JudgedImage, KeepRule
from openblip.capfilt.manifest import manifests
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.report import NUM_BINS, capfilt_report, write_capfilt_report
from openblip.capfilt.shard import process_shard
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter, write_json_atomically
from tests.capfilt.judged import picture, write_judged

NASTY = "<img src=x onerror=alert(1)> & more"
NOISES = ("none", "other_caption", "none", "alt_text")


def write_shard(folder: Path, name: str, *, num: int = 12, has_noise: bool = True) -> None:
    """Write a shard of pictures into `web/`, and what CapFilt would make of it into `capfilt/`."""
    images = []
    for index in range(num):
        # The third noise kind is a true caption that is dropped, the fourth a wrong one kept.
        probability = (0.9, 0.1, 0.4, 0.6)[index % 4]
        web = Caption(NASTY if index % 2 else f"web {index}", match_probability=probability)
        written = replace(web, source="synthetic", match_probability=1 - probability)
        if index % 3:
            written = replace(written, text=f"synthetic {index}")
        meta = {"noise": NOISES[index % 4]} if has_noise else {}
        images.append(JudgedImage(f"{name}_{index}", KeepRule().apply([web, written]), meta))
    write_judged(folder, name, images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shard(tmp_path, "00000")
    write_shard(tmp_path, "00001", num=5)
    return tmp_path / "capfilt"


def check_sums(report: dict) -> None:
    """Every count of a report must be the sum of its parts."""
    shards = report["shards"]
    assert report["num_shards"] == len(shards) == sum(run["num_shards"] for run in report["runs"])
    for name in ("num_images", "num_images_kept"):
        assert report[name] == sum(shard[name] for shard in shards)
    assert report["bad"] == dict(sum((Counter(shard["bad"]) for shard in shards), Counter()))
    for source, counts in report["captions"].items():
        assert counts["judged"] == counts["kept"] + sum(counts["dropped"].values())
        assert counts["keep_rate"] == counts["kept"] / counts["judged"]
        assert counts["judged"] == sum(report["match_probability"]["by_source"][source])
        for name in ("judged", "kept"):
            parts = [shard["captions"][source][name] for shard in shards]
            assert counts[name] == sum(parts)
    assert report["captions"].keys() == report["match_probability"]["by_source"].keys()


def test_every_count_adds_up(folder):
    report = capfilt_report(folder)
    check_sums(report)
    assert report["num_images"] == 17
    assert report["bad"] == {"truncated": 4}
    assert report["captions"]["web"] == {
        "judged": 17, "kept": 9, "dropped": {"unmatched": 8}, "keep_rate": 9 / 17,
    }  # fmt: skip
    assert report["seconds"] == 4
    assert report["images_per_s"] == 17 / 4
    by_noise = report["match_probability"]["by_noise"]
    assert list(by_noise) == ["none", "alt_text", "other_caption"]
    assert by_noise["none"][NUM_BINS * 9 // 10] == by_noise["none"][NUM_BINS * 4 // 10] + 1
    truth = report["planted_truth"]
    assert truth["num_captions"] == {noise: sum(bins) for noise, bins in by_noise.items()}
    assert json.loads(json.dumps(report)) == report


def test_the_counts_of_a_shard_that_was_really_done_add_up(shard, models, tmp_path):
    [captioner] = models.captioners
    recipe = CapfiltRecipe(decoding=captioner.decoding, prompts=captioner.prompts)
    process_shard(shard, tmp_path / "out", models, recipe)
    report = write_capfilt_report(tmp_path / "out")
    check_sums(report)
    assert sum(report["bad"].values()) == 3
    assert set(report["captions"]) == {"web", "synthetic", "human"}
    assert "planted_truth" not in report


NEW_REASONS = ("dissimilar", "near_duplicate", "outranked", "too_common")


@pytest.fixture
def prefiltered(tmp_path: Path) -> Path:
    """Write six images: four web captions of new drop reasons, the first of them without ITM."""
    images = []
    for index, reason in enumerate((*NEW_REASONS, None, None)):
        probability = None if reason == "dissimilar" else 0.8
        web = Caption(f"web {index}", "web", probability, 0.1 * index, drop_reason=reason)
        meta = {"noise": "alt_text" if index in (0, 1) else "none"}
        images.append(JudgedImage(f"k{index}", (web,), meta))
    return write_judged(tmp_path, "00000", images)


def test_captions_that_itm_did_not_judge_are_counted_and_shown(prefiltered):
    report = write_capfilt_report(prefiltered)
    assert report["captions"]["web"] == {
        "judged": 6, "kept": 2, "dropped": dict.fromkeys(NEW_REASONS, 1), "keep_rate": 1 / 3,
    }  # fmt: skip
    matches = report["match_probability"]
    assert matches["not_judged"] == {"web": 1}
    assert sum(matches["by_source"]["web"]) == 5
    assert {noise: sum(bins) for noise, bins in matches["by_noise"].items()} == {
        "none": 4, "alt_text": 1,
    }  # fmt: skip
    page = (prefiltered / "report.html").read_text(encoding="utf-8")
    assert "Left out, as ITM did not judge them: web 1." in page
    assert page.count("not judged by ITM</span>") == 1
    for reason in NEW_REASONS:
        assert f"dropped: {reason.replace('_', ' ')}</span>" in page


def test_an_unjudged_caption_counts_as_dropped_and_not_in_the_auc(prefiltered):
    truth = capfilt_report(prefiltered)["planted_truth"]
    assert truth["num_captions"] == {"none": 4, "alt_text": 2}
    assert truth["num_not_judged"] == {"none": 0, "alt_text": 1}
    assert truth["keep_rate"] == {"none": 1, "alt_text": 0.5}
    assert truth["roc_auc"] == 0.5  # all match probabilities are equal


def test_a_kind_of_noise_that_itm_never_saw_has_no_auc(tmp_path):
    rows = [(0.9, "none"), (0.1, "other_caption"), (None, "alt_text")]
    images = [
        JudgedImage(f"k{index}", (Caption("a", "web", p, 0.0, drop_reason=None if p else "x"),),
                    {"noise": noise})
        for index, (p, noise) in enumerate(rows)
    ]  # fmt: skip
    out = write_judged(tmp_path, "00000", images)
    truth = write_capfilt_report(out)["planted_truth"]
    assert truth["roc_auc_by_noise"] == {"other_caption": 1}
    assert truth["num_captions"] == {"none": 1, "alt_text": 1, "other_caption": 1}
    assert truth["keep_rate"] == {"none": 1, "alt_text": 0, "other_caption": 0}


def test_a_folder_that_itm_never_saw_has_a_report(tmp_path):
    caption = Caption("a", "web", None, 0.0, drop_reason="dissimilar")
    out = write_judged(tmp_path, "00000", [JudgedImage("k", (caption,), {"noise": "none"})])
    report = write_capfilt_report(out)
    assert report["match_probability"]["by_source"] == {"web": [0] * NUM_BINS}
    assert report["match_probability"]["by_noise"] == {}
    assert "planted_truth" not in report


def test_a_report_is_no_manifest(folder):
    first = write_capfilt_report(folder)
    assert [path.name for path in manifests(folder)] == ["00000.json", "00001.json"]
    assert write_capfilt_report(folder) == first == json.loads((folder / "report.json").read_text())


def test_a_shard_named_report_is_not_overwritten(tmp_path):
    write_shard(tmp_path, "report")
    before = (tmp_path / "capfilt" / "report.json").read_bytes()
    with pytest.raises(ValueError, match="rename the shard"):
        write_capfilt_report(tmp_path / "capfilt")
    assert (tmp_path / "capfilt" / "report.json").read_bytes() == before


@pytest.mark.parametrize("write", [capfilt_report, write_capfilt_report])
def test_a_folder_without_manifests_is_refused(write, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no shard"):
            write(place)


def test_captions_that_are_not_those_of_the_manifest_are_refused(folder):
    path = folder / "00001.captions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"00001\.json tells 5 images.*are of 4 images"):
        capfilt_report(folder)


def test_a_filter_that_diverged_is_told(folder):
    path = folder / "00001.captions.jsonl"
    path.write_text(
        path.read_text().replace('"match_probability": 0.9', '"match_probability": NaN')
    )
    with pytest.raises(ValueError, match="image 00001_0: its match probability is NaN"):
        capfilt_report(folder)


def test_images_of_one_key_do_not_stop_the_page(tmp_path):
    write_shard(tmp_path, "00000", num=40)
    path = tmp_path / "capfilt" / "00000.captions.jsonl"
    path.write_text(re.sub(r'"key": "00000_\d+"', '"key": "same"', path.read_text()))
    write_capfilt_report(tmp_path / "capfilt")


def test_shards_of_two_runs_are_told_apart(folder):
    path = folder / "00001.json"
    value = json.loads(path.read_text())
    value["settings"]["keep"]["threshold"] = 0.45
    write_json_atomically(path, value)
    report = write_capfilt_report(folder)
    assert [run["num_shards"] for run in report["runs"]] == [1, 1]
    assert "planted_truth" not in report
    assert "2 different runs" in (folder / "report.html").read_text(encoding="utf-8")


def check_stands_alone(html: str) -> None:
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; more" in html
    assert "<script" not in html
    targets = re.findall(r'(?:src|href)="([^"]*)"', html)
    outside = [one for one in targets if not one.startswith(("data:image/", "#"))]
    allowed = {"https://arxiv.org/abs/2201.12086", "capfilt/report.html"}
    assert set(outside) <= allowed, outside


def test_the_page_stands_alone_and_is_the_same_each_time(folder):
    write_capfilt_report(folder)
    page = (folder / "report.html").read_bytes()
    check_stands_alone(page.decode())
    # Six web captions of either fate and as many synthetic ones, each on a picture.
    assert page.count(b"data:image/png") == 24
    assert b"planted: other caption" in page
    assert b"dropped: unmatched" in page
    write_capfilt_report(folder)
    assert (folder / "report.html").read_bytes() == page


def test_pictures_that_are_gone_leave_a_note(folder):
    (folder.parent / "web" / "00000.tar").unlink()
    with ShardWriter(folder.parent / "web" / "00001.tar") as writer:
        writer.write(Sample("00001_0", b"no picture"))
    write_capfilt_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in page
    assert "The shard 00000.tar is gone." in page
    assert "The picture is gone." in page
    check_stands_alone(page)


MEASURES = ("tr_at_1", "tr_at_5", "ir_at_1", "ir_at_5", "bleu_4", "cider")


def write_loop(out: Path, *, has_ablation: bool) -> BootstrapData:
    """Write what a finished loop leaves, as far as its report reads it."""
    write_shard(out, "00000", has_noise=has_ablation)
    with ShardWriter(out / "test" / "00000.tar") as writer:
        writer.write(Sample("t0", picture(0), (Caption("a human wrote", "human"),)))
    rows = {
        name: dict.fromkeys(MEASURES, value)
        for name, value in (
            ("base", 0.5), ("filter_only", 0.6), ("captioner_only", 0.55), ("bootstrapped", 0.75)
        )
    }  # fmt: skip
    results = {
        "before": rows["base"], "after": rows["bootstrapped"], "filter": {}, "seconds": 7300.0,
        "seconds_by_stage": {"base": 7200.0, "evaluation of base": 100.0},
    }  # fmt: skip
    if has_ablation:
        results["ablation"] = rows
    (out / "evaluation").mkdir()
    (out / "logs").mkdir()
    for name in ("base", "bootstrapped"):
        evaluation = {
            "retrieval": {"num_images": 1, "num_texts": 1},
            "captioning": {"captions": {"t0": f"{name} {NASTY}"}},
        }
        write_json_atomically(out / "evaluation" / f"{name}.json", evaluation)
        lines = [{"step": i, "lr": 1, "loss": 3.0, "itm": 0.5, "other": 9} for i in range(300)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / "logs" / f"{name}.jsonl").write_text(text)
    (out / "recipe.yaml").write_text("vocab_size: 16\n")
    write_json_atomically(out / "results.json", results)
    return BootstrapData(out / "web", out / "human", out / "test")


def test_the_loop_page_shows_the_ablation_beside_the_paper(tmp_path):
    data = write_loop(tmp_path, has_ablation=True)
    path = write_bootstrap_report(tmp_path, data)
    assert path == tmp_path / "report.html"
    page = path.read_bytes()
    html = page.decode()
    check_stands_alone(html)
    assert (tmp_path / "capfilt" / "report.html").exists()
    assert "80.6 (+2.2)" in html
    assert "75.0 (+25.0)" in html
    assert "TR@1 no, IR@1 no, CIDEr no" in html
    assert html.count("<polyline") == 4
    assert "bootstrapped &lt;img" in html
    assert "a human wrote" in html
    assert "ROC-AUC" in html
    assert "2.0 h" in html
    write_bootstrap_report(tmp_path, data)
    assert path.read_bytes() == page


def test_the_loop_page_leaves_out_what_there_is_not(tmp_path):
    data = write_loop(tmp_path, has_ablation=False)
    (tmp_path / "test" / "00000.tar").unlink()
    html = write_bootstrap_report(tmp_path, data).read_text(encoding="utf-8")
    check_stands_alone(html)
    assert "80.6" not in html
    assert "ROC-AUC" not in html
    assert "The picture is gone." in html


def test_an_unfinished_loop_has_no_page(tmp_path):
    data = write_loop(tmp_path, has_ablation=False)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match="holds no finished loop"):
        write_bootstrap_report(tmp_path, data)
