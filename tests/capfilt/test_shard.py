import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from openblip.capfilt.captioner import Captioner
from openblip.capfilt.filter import Filter
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.manifest import Manifest, OutputPaths, manifests, read_judged
from openblip.capfilt.models import Models
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.shard import process_shard, rethreshold_shard
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter
from openblip.data.sources import read_samples
from openblip.models.blip import Blip

NAMES = ["00000.captions.jsonl", "00000.failed.jsonl", "00000.json", "00000.tar"]
NUM_GOOD, NUM_READ = 7, 7
"""Images of the shard that can be used, and the captions that they have."""


@pytest.fixture
def recipe(captioner: Captioner) -> CapfiltRecipe:
    return CapfiltRecipe(
        decoding=captioner.decoding, prompts=captioner.prompts, batch_size=3, seed=captioner.seed
    )


@pytest.fixture
def process(shard: Path, models: Models, recipe: CapfiltRecipe) -> Callable[..., Manifest]:
    """Process the shard into a folder, with anything else that is asked for."""

    def run(folder: Path, **changes: object) -> Manifest:
        values = {"shard": shard, "models": models, "recipe": recipe}
        return process_shard(folder=folder, **(values | changes))

    return run


def read(shard: Path) -> tuple[list[Sample], Counter[str]]:
    bad: Counter[str] = Counter()
    samples = list(read_samples(shard, on_bad=lambda key, reason: bad.update([reason])))
    return samples, bad


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without_time(folder: Path) -> dict[str, object]:
    """Return what the files hold, but for the seconds that they took."""
    held = dict(files(folder))
    manifest = json.loads(held.pop("00000.json"))
    del manifest["seconds"]
    return {**held, "manifest": manifest}


def test_one_shard_becomes_three_files_and_nothing_else(
    process: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = process(tmp_path / "out")
    assert list(files(tmp_path / "out")) == NAMES
    assert Manifest.read(tmp_path / "out" / "00000.json") == manifest
    assert manifests(tmp_path / "out") == [tmp_path / "out" / "00000.json"]


def test_every_caption_is_kept_or_dropped_with_a_reason(
    process: Callable[..., Manifest], tmp_path: Path, shard: Path
) -> None:
    manifest = process(tmp_path / "out")
    judged = list(read_judged(tmp_path / "out" / "00000.captions.jsonl"))
    captions = [caption for image in judged for caption in image.captions]
    assert len(captions) == NUM_READ + NUM_GOOD
    assert manifest.num_images == len(judged) == NUM_GOOD
    kept = Counter(c.source for c in captions if c.drop_reason is None)
    dropped = Counter((c.source, c.drop_reason) for c in captions if c.drop_reason is not None)
    assert manifest.kept == kept
    assert dropped == {
        (source, reason): number
        for source, reasons in manifest.dropped.items()
        for reason, number in reasons.items()
    }
    assert kept
    assert {"unmatched", "empty"} <= {reason for _, reason in dropped}
    assert all(0 <= c.match_probability <= 1 and c.filter_model for c in captions)
    read_texts = [c.text for sample in read(shard)[0][:NUM_GOOD] for c in sample.captions]
    assert [c.text for c in captions if c.source != "synthetic"] == read_texts


def test_bad_samples_are_counted_by_reason(
    process: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = process(tmp_path / "out")
    assert sum(manifest.bad.values()) == 3
    assert manifest.bad.keys() - {"truncated", "corrupt"} == {"missing_image", "bad_json"}


def test_images_and_meta_are_untouched_and_only_kept_captions_are_written(
    process: Callable[..., Manifest], tmp_path: Path, shard: Path
) -> None:
    manifest = process(tmp_path / "out")
    given = {sample.key: sample for sample in read(shard)[0]}
    written, bad = read(tmp_path / "out" / "00000.tar")
    assert not bad
    for sample in written:
        before = given[sample.key]
        assert sample.image_bytes == before.image_bytes
        assert (sample.meta, sample.image_extension) == (before.meta, before.image_extension)
        assert sample.captions
        assert all(caption.drop_reason is None for caption in sample.captions)
    assert Counter(c.source for sample in written for c in sample.captions) == manifest.kept
    judged = read_judged(tmp_path / "out" / "00000.captions.jsonl")
    keeping = [i.key for i in judged if any(c.drop_reason is None for c in i.captions)]
    assert [sample.key for sample in written] == keeping


def test_a_done_shard_is_not_done_again(
    process: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, before = process(tmp_path / "out"), files(tmp_path / "out")
    monkeypatch.setattr(Captioner, "caption", None)
    assert process(tmp_path / "out") == manifest
    assert files(tmp_path / "out") == before


def changed(blip: Blip) -> Blip:
    copy = Blip(blip.config).eval()
    copy.load_state_dict(blip.state_dict())
    with torch.no_grad():
        copy.vision.norm.bias += 0.1
    return copy


def test_what_has_changed_since_is_named(
    process: Callable[..., Manifest],
    tmp_path: Path,
    captioner: Captioner,
    judge: Filter,
    recipe: CapfiltRecipe,
    shard: Path,
) -> None:
    process(tmp_path / "out")
    before = files(tmp_path / "out")
    strict = recipe.model_copy(update={"keep": KeepRule(threshold=0.9)})
    for message, changes in (
        ("setting keep was .*0.5.* is .*0.9", {"recipe": strict}),
        (
            "captioner was",
            {"models": Models((replace(captioner, blip=changed(captioner.blip)),), (judge,))},
        ),
        (
            "filter was",
            {"models": Models((captioner,), (replace(judge, blip=changed(judge.blip)),))},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            process(tmp_path / "out", **changes)
    with ShardWriter(shard) as writer:
        writer.write(Sample("z", b"other"))
    with pytest.raises(ValueError, match="input was"):
        process(tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_manifest_that_is_none_is_named(process: Callable[..., Manifest], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.json").write_text('{"shard": 1}')
    with pytest.raises(ValueError, match=r"00000\.json is no CapFilt manifest"):
        process(tmp_path / "out")


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_another_threshold_gives_what_a_run_with_it_gives(
    process: Callable[..., Manifest], tmp_path: Path, recipe: CapfiltRecipe, threshold: float
) -> None:
    keep = KeepRule(threshold=threshold, sources=("web", "synthetic"))
    process(tmp_path / "first")
    rethreshold_shard(tmp_path / "first" / "00000.json", tmp_path / "again", keep)
    process(tmp_path / "run", recipe=recipe.model_copy(update={"keep": keep}))
    assert without_time(tmp_path / "again") == without_time(tmp_path / "run")


def test_another_threshold_needs_the_same_images(
    process: Callable[..., Manifest], tmp_path: Path, shard: Path
) -> None:
    process(tmp_path / "out")
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    with pytest.raises(ValueError, match="is gone or has changed"):
        rethreshold_shard(tmp_path / "out" / "00000.json", tmp_path / "again", KeepRule())
    shard.unlink()
    with pytest.raises(ValueError, match="is gone or has changed"):
        rethreshold_shard(tmp_path / "out" / "00000.json", tmp_path / "again", KeepRule())
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("lost", [NAMES[2:3], NAMES[2:]])
def test_a_shard_that_was_stopped_between_its_files_is_done_again(
    process: Callable[..., Manifest], tmp_path: Path, lost: list[str]
) -> None:
    process(tmp_path / "out")
    before = without_time(tmp_path / "out")
    for name in lost:
        (tmp_path / "out" / name).unlink()
    process(tmp_path / "out")
    assert without_time(tmp_path / "out") == before


def test_a_failure_leaves_no_file(
    process: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(ShardWriter, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        process(tmp_path / "out")
    assert list(files(tmp_path / "out")) == NAMES[:2]
    monkeypatch.undo()
    process(tmp_path / "out")
    assert list(files(tmp_path / "out")) == NAMES


def test_the_batch_size_changes_no_decision(
    process: Callable[..., Manifest], tmp_path: Path, recipe: CapfiltRecipe
) -> None:
    """Texts and decisions are equal; probabilities up to the rounding of another batch shape."""
    judged = []
    for size in (1, 2, 7, 32):
        out = tmp_path / str(size)
        process(out, recipe=recipe.model_copy(update={"batch_size": size}))
        judged.append(list(read_judged(out / "00000.captions.jsonl")))
    for other in judged[1:]:
        for a, b in zip(judged[0], other, strict=True):
            assert a.key == b.key
            for one, two in zip(a.captions, b.captions, strict=True):
                assert one.match_probability == pytest.approx(two.match_probability, abs=1e-5)
                assert (one.text, one.source, one.drop_reason, one.seed) == (
                    two.text, two.source, two.drop_reason, two.seed
                )  # fmt: skip


def test_several_captions_per_image_are_all_judged(
    process: Callable[..., Manifest], tmp_path: Path, models: Models, recipe: CapfiltRecipe
) -> None:
    [captioner] = models.captioners
    process(
        tmp_path / "out",
        models=replace(models, captioners=(replace(captioner, captions_per_image=3),)),
        recipe=recipe.model_copy(update={"captions_per_image": 3}),
    )
    judged = list(read_judged(tmp_path / "out" / "00000.captions.jsonl"))
    for image in judged:
        assert sum(caption.source == "synthetic" for caption in image.captions) == 3


def test_two_images_of_one_key_are_not_mixed_up(
    process: Callable[..., Manifest], tmp_path: Path
) -> None:
    """As `x.jpg` and `x.png` in a folder: the second one is counted, not written as the first."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, text in (("x", "a red cat"), ("y", "a blue dog")):
        (folder / f"{name}.txt").write_text(text)
        for kind in ("bmp", "png"):
            Image.new("RGB", (9, 9), {"bmp": "red", "png": "blue"}[kind]).save(
                folder / f"{name}.{kind}"
            )
    (folder / "x.bmp").write_bytes(b"broken")
    manifest = process(tmp_path / "out", shard=folder)
    assert manifest.num_images + sum(manifest.bad.values()) == 4
    [image] = read_judged(tmp_path / "out" / "images.captions.jsonl")
    assert image.key == "y"
    assert manifest.bad == {"not_an_image": 1, "repeated_key": 2}


def test_an_empty_shard_is_done_too(process: Callable[..., Manifest], tmp_path: Path) -> None:
    empty = tmp_path / "none.tar"
    with ShardWriter(empty):
        pass
    manifest = process(tmp_path / "out", shard=empty)
    assert (manifest.num_images, manifest.kept, manifest.dropped, manifest.bad) == (0, {}, {}, {})
    assert read(tmp_path / "out" / "none.tar") == ([], Counter())


def test_what_came_out_goes_in_again(
    process: Callable[..., Manifest], tmp_path: Path, recipe: CapfiltRecipe
) -> None:
    """A second round judges the first round's synthetic captions as it judges the web's."""
    everything = recipe.model_copy(update={"keep": KeepRule(threshold=0)})
    first = process(tmp_path / "first", recipe=everything)
    second = process(tmp_path / "second", shard=tmp_path / "first" / "00000.tar", recipe=everything)
    judged = read_judged(tmp_path / "second" / "00000.captions.jsonl")
    assert sum(len(image.captions) for image in judged) == (
        sum(first.kept.values()) + second.num_images
    )


def test_lines_that_are_no_judgement_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.captions.jsonl"
    path.write_text('{"key": "a", "captions": [], "meta": {}}\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"x\.captions\.jsonl, line 2"):
        list(read_judged(path))


def test_only_json_beside_captions_is_a_manifest(
    process: Callable[..., Manifest], tmp_path: Path
) -> None:
    process(tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text("{}")
    shutil.copy(tmp_path / "out" / "00000.tar", tmp_path / "out" / "other.tar")
    assert manifests(tmp_path / "out") == [OutputPaths.of("00000", tmp_path / "out").manifest]


def test_a_caption_keeps_what_was_known_of_it(
    process: Callable[..., Manifest], tmp_path: Path
) -> None:
    source = tmp_path / "known.tar"
    buffer = tmp_path / "x.png"
    Image.new("RGB", (9, 9), "red").save(buffer)
    known = Caption("a red cat", "synthetic", mean_log_probability=-1.0, model="older", seed=9)
    with ShardWriter(source) as writer:
        writer.write(Sample("x", buffer.read_bytes(), (known,), image_extension="png"))
    process(tmp_path / "out", shard=source)
    [image] = read_judged(tmp_path / "out" / "known.captions.jsonl")
    caption = image.captions[0]
    assert (caption.model, caption.seed, caption.mean_log_probability) == ("older", 9, -1.0)
