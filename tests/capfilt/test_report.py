import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openblip.capfilt.bootstrap import BootstrapData
from openblip.capfilt.bootstrap_report import write_bootstrap_report
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.manifest import Manifest, manifests
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.report import NUM_BINS, capfilt_report, write_capfilt_report
from openblip.capfilt.shard import process_shard
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter, write_json_atomically

NASTY = "<img src=x onerror=alert(1)> & more"
NOISES = ("none", "other_caption", "none", "alt_text")


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(folder: Path, name: str, *, num: int = 12, has_noise: bool = True) -> None:
    """Write a shard of pictures into `web/`, and what CapFilt would make of it into `capfilt/`."""
    rule = KeepRule()
    shard = folder / "web" / f"{name}.tar"
    kept, dropped, lines = Counter[str](), dict[str, Counter[str]](), []
    with ShardWriter(shard) as writer:
        for index in range(num):
            key = f"{name}_{index}"
            # The third noise kind is a true caption that is dropped, the fourth a wrong one kept.
            probability = (0.9, 0.1, 0.4, 0.6)[index % 4]
            web = Caption(NASTY if index % 2 else f"web {index}", match_probability=probability)
            written = replace(web, source="synthetic", match_probability=1 - probability)
            if index % 3:
                written = replace(written, text=f"synthetic {index}")
            captions = rule.apply([web, written])
            meta = {"noise": NOISES[index % 4]} if has_noise else {}
            writer.write(Sample(key, picture(index), (web,), meta))
            lines.append({"key": key, "captions": [c.to_json() for c in captions], "meta": meta})
            for caption in captions:
                if caption.drop_reason is None:
                    kept[caption.source] += 1
                else:
                    dropped.setdefault(caption.source, Counter())[caption.drop_reason] += 1
    manifest = Manifest(
        shard=str(shard), input_checksum="1", output_checksum="2", captioner="c0ffee",
        filter="f117e7", settings=CapfiltRecipe(keep=rule).model_dump(mode="json"), version="0",
        num_images=num, bad={"truncated": 2}, kept=dict(kept),
        dropped={source: dict(reasons) for source, reasons in dropped.items()},
        seconds={"total": 2.0},
    )  # fmt: skip
    (folder / "capfilt").mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "capfilt" / f"{name}.captions.jsonl").write_text(text, encoding="utf-8")
    write_json_atomically(folder / "capfilt" / f"{name}.json", manifest.to_json())


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
