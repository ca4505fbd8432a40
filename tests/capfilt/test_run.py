"""Units, engines, retry: whole runs on small data."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from openblip.capfilt import work
from openblip.capfilt.engines import run_here, slurm_share
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.manifest import Manifest, OutputPaths, manifests, read_failed, read_judged
from openblip.capfilt.models import EncodedBatch, Models
from openblip.capfilt.ray_engine import room_for
from openblip.capfilt.recipe import CapfiltRecipe, recipe_of, settings_of
from openblip.capfilt.run import check_cut, remove_leftovers, threshold_of_share, write_plan
from openblip.capfilt.shard import OtherRunError, process_shard, rethreshold_shard, retry_shard
from openblip.capfilt.units import Unit, list_units
from openblip.capfilt.work import Job, Queue, RunProgress
from openblip.data.samples import Caption, Sample
from openblip.data.shards import Shard
from openblip.data.sinks import ShardWriter
from openblip.data.sources import read_samples
from openblip.data.writers import OutputKind
from openblip.generation import Decoding
from openblip.training.log import ProgressLine
from tests.capfilt.conftest import TEXTS, picture

DECODING = Decoding(method="nucleus", min_tokens=1, max_tokens=5)


@pytest.fixture
def recipe() -> CapfiltRecipe:
    return CapfiltRecipe(
        decoding=DECODING, prompts=("a ",), seed=0, batch_size=3, keep=KeepRule(threshold=0.4)
    )


def write_shard(path: Path, keys: str) -> Path:
    with ShardWriter(path) as writer:
        for number, key in enumerate(keys):
            writer.write(Sample(key, picture(number), (Caption(TEXTS[number % 3]),)))
    return path


def run(units: list[Unit], job: Job, models: Models, **options: bool) -> Queue:
    queue = Queue(units, job, **options)
    with ProgressLine("test", None, is_silent=True) as line:
        run_here(queue, RunProgress(line, queue), models)
    return queue


def units_of(address: Path, most_samples: int = 4, most_bytes: int = 1 << 30) -> list[Unit]:
    return list_units(address, most_samples=most_samples, most_bytes=most_bytes)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder", "tar"])
def test_units_hold_every_sample_once_and_are_named_alike(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    source = folder
    if kind == "tar":
        source = write_shard(tmp_path / "x.tar", "abcdefghij")
    elif kind != "folder":
        source = tmp_path / f"x.{kind}"
        rows = [{"key": f"k{n}", "image": f"images/{n}.jpg", "text": "a cat"} for n in range(10)]
        if kind == "jsonl":
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "csv":
            lines = ["key,image,text", *(",".join(row.values()) for row in rows)]
            source.write_text("\n".join(lines) + "\n")
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    most_bytes = source.stat().st_size // 3 + 1 if kind == "tar" else 1 << 30
    units = units_of(source, 4, most_bytes)
    stem = "images" if kind == "folder" else "x"
    assert [unit.name for unit in units] == [f"{stem}_{n:05d}-of-00003" for n in range(3)]
    assert units == units_of(source, 4, most_bytes)
    parts = [[sample.key for sample in unit.samples()] for unit in units]
    assert max(map(len, parts)) <= 4
    assert sorted(key for part in parts for key in part) == sorted(
        sample.key for sample in read_samples(source, on_bad=lambda key, reason: None)
    )
    assert len(units_of(source, 10)) == 1


def test_shards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name / "x.tar", "ab")
    units = units_of(Path(f"{tmp_path}/{{a,b}}/x.tar"))
    assert len({unit.name for unit in units}) == 2
    assert all(unit.name.startswith("x-") for unit in units)


def test_a_run_does_what_is_left_and_names_what_fails(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "RETRY_DELAY_S", 0.0)
    web = tmp_path / "web"
    for name in ("a", "b", "c"):
        write_shard(web / f"{name}.tar", "xyz")
    job = Job((), (), recipe, tmp_path / "out")
    units = units_of(web)
    bad = Unit("d", Shard(str(tmp_path / "d.parquet")))
    (tmp_path / "d.parquet").write_bytes(b"none")
    first = run([*units[:2], bad], job, models)
    assert (first.num_done, first.num_done_before) == (2, 0)
    assert list(first.failed) == ["d"]
    assert "cannot read shard" in first.failed["d"]
    second = run(units, job, models)
    assert (second.num_done, second.num_done_before) == (1, 2)
    other = replace(job, recipe=recipe.model_copy(update={"seed": 9}))
    with pytest.raises(OtherRunError, match="setting seed was 0 and is 9"):
        run(units, other, models)
    assert run(units, other, models, is_forced=True).num_done == 3


def test_what_fails_for_a_while_is_tried_again(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "RETRY_DELAY_S", 0.0)
    monkeypatch.setattr(work, "process_shard", failing := Failing(times=2))
    job = Job((), (), recipe, tmp_path / "out")
    units = units_of(write_shard(tmp_path / "a.tar", "xyz"))
    queue = run(units, job, models)
    assert (queue.num_done, queue.failed, failing.times) == (1, {}, 0)
    failing.times = 3
    remove = OutputPaths.of("a", tmp_path / "out").manifest
    remove.unlink()
    queue = run(units, job, models)
    assert queue.failed == {"a": f"{units[0]}: Input/output error"}


class Failing:
    """A disk that gives an error some times, and then works."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, *arguments: object, **options: object) -> Manifest:
        if self.times:
            self.times -= 1
            raise OSError(5, "Input/output error")
        return process_shard(*arguments, **options)  # type: ignore[arg-type]


def test_a_unit_that_kills_its_workers_is_given_up(tmp_path: Path, recipe: CapfiltRecipe) -> None:
    [unit] = units_of(write_shard(tmp_path / "a.tar", "x"))
    queue = Queue([unit], Job((), (), recipe, tmp_path / "out"))
    queue.open("c", "f")
    for _ in range(work.MOST_DEATHS):
        assert not queue.is_finished
        assert queue.take() == unit
        queue.report_death(unit)
    assert queue.is_finished
    assert queue.failed == {"a": f"its worker died {work.MOST_DEATHS} times"}


def test_another_cut_of_the_same_shards_is_refused(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe
) -> None:
    source = tmp_path / "x.jsonl"
    rows = []
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
        rows.append(json.dumps({"key": f"k{number}", "image": f"{number}.jpg", "text": TEXTS[0]}))
    source.write_text("\n".join(rows) + "\n")
    job = Job((), (), recipe, tmp_path / "out")
    run(units_of(source, 2), job, models)
    assert len(manifests(job.output)) == 2
    whole = units_of(source, 4)
    with pytest.raises(OtherRunError, match="was cut into 2 units"):
        check_cut(job.output, whole, is_forced=False)
    check_cut(job.output, units_of(source, 2), is_forced=False)
    check_cut(job.output, whole, is_forced=True)
    assert list(job.output.iterdir()) == []


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl", "files"])
def test_every_kind_of_output_holds_the_same(
    kind: OutputKind, shard: Path, models: Models, recipe: CapfiltRecipe, tmp_path: Path
) -> None:
    expected = tmp_path / "tar"
    process_shard(shard, expected, models, recipe)
    given = list(read_samples(expected / "00000.tar", on_bad=lambda k, r: pytest.fail(r)))
    assert given
    out = tmp_path / "out"
    process_shard(shard, out, models, recipe.model_copy(update={"output": kind}))
    data = OutputPaths.of("00000", out, kind).data
    samples = list(read_samples(data, on_bad=lambda k, r: pytest.fail(r)))
    assert sorted(samples, key=lambda s: s.key) == sorted(given, key=lambda s: s.key)
    rethreshold_shard(out / "00000.json", tmp_path / "again", recipe.keep)
    assert (tmp_path / "again" / "00000.captions.jsonl").read_bytes() == (
        out / "00000.captions.jsonl"
    ).read_bytes()


def test_what_was_mended_is_captioned_as_if_it_had_never_failed(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(picture(number))
        (folder / f"{number}.txt").write_text(TEXTS[number % 3])
    Image.new("RGB", (9, 900)).save(folder / "long.png")
    recipe = recipe.model_copy(
        update={"images": recipe.images.model_copy(update={"max_aspect": 10.0}), "batch_size": 1}
    )
    whole = process_shard(folder, tmp_path / "whole", models, recipe)
    mended = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(b"no image")
    process_shard(folder, tmp_path / "out", models, recipe)
    paths = OutputPaths.of("images", tmp_path / "out")
    assert {(bad.key, bad.reason) for bad in read_failed(paths.failed)} == {
        ("3", "not_an_image"), ("long", "extreme_aspect"),
    }  # fmt: skip
    before = paths.captions.read_bytes()
    assert retry_shard(paths.manifest, models).num_images == 6
    assert paths.captions.read_bytes() == before
    (folder / "3.jpg").write_bytes(mended)
    again = retry_shard(paths.manifest, models)
    assert again.num_images == 7
    for name in ("images.tar", "images.captions.jsonl", "images.failed.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert replace(again, seconds={}) == replace(whole, seconds={})
    (folder / "5.jpg").unlink()
    (folder / "6.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match="gone or has changed"):
        rethreshold_shard(paths.manifest, tmp_path / "new", KeepRule())


def test_images_are_left_out_by_shape_likeness_and_the_users_word(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe
) -> None:
    def gradient(kind: str, **options: int) -> bytes:
        image = Image.linear_gradient("L").resize((40, 40)).rotate(90)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, kind, **options)
        return buffer.getvalue()

    samples = {
        "a": picture(1), "b": gradient("PNG"), "b_again": gradient("JPEG", quality=60),
        "c_small": picture(2), "d_unwanted": picture(3), "e_error": picture(4),
    }  # fmt: skip
    buffer = io.BytesIO()
    Image.new("RGB", (4, 60)).save(buffer, "PNG")
    samples["f_thin"] = buffer.getvalue()
    with ShardWriter(tmp_path / "x.tar") as writer:
        for key, data in samples.items():
            writer.write(Sample(key, data, (Caption(TEXTS[0]),), image_extension="jpg"))
    predicate = tmp_path / "mine.py"
    predicate.write_text(
        "def wanted(sample):\n"
        "    if sample.key == 'e_error':\n        return 1 / 0\n"
        "    return 'not_mine' if sample.key == 'd_unwanted' else sample.key != 'c_small'\n"
    )
    asked = {"images": {"min_side_px": 5, "max_hash_bits": 2}, "predicate": f"{predicate}:wanted"}
    recipe = CapfiltRecipe.model_validate_json(json.dumps(settings_of(recipe) | asked))
    manifest = process_shard(tmp_path / "x.tar", tmp_path / "out", models, recipe)
    paths = OutputPaths.of("x", tmp_path / "out")
    assert {bad.key: bad.reason for bad in read_failed(paths.failed)} == {
        "b_again": "near_duplicate_image", "c_small": "predicate",
        "d_unwanted": "predicate: not_mine",
        "e_error": "predicate failed: ZeroDivisionError", "f_thin": "small_image",
    }  # fmt: skip
    assert sum(manifest.bad.values()) == 5
    assert recipe_of(manifest) == recipe
    before = settings_of(recipe)
    predicate.write_text("def wanted(sample):\n    return True\n")
    assert settings_of(recipe) != before
    wrong = recipe.model_copy(update={"predicate": f"{predicate}:absent"})
    with pytest.raises(ValueError, match="has no function 'absent'"):
        process_shard(tmp_path / "x.tar", tmp_path / "other", models, wrong)


def test_models_that_share_an_image_encoder_encode_once(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    [captioner], [judge] = models.captioners, models.filters
    both = Models((captioner, captioner), (judge, judge))
    times = dict.fromkeys((captioner.encoder, judge.encoder), 0)
    for model in (captioner, judge):
        encode = model.engine.encode

        def counted(images: object, model: object = model, encode: object = encode) -> object:
            if not hasattr(images, "states"):
                times[model.encoder] += 1  # type: ignore[attr-defined]
            return encode(images)  # type: ignore[operator]

        monkeypatch.setattr(model.engine, "encode", counted)
    images = {16: torch.rand(2, 3, 16, 16), 24: torch.rand(2, 3, 24, 24)}
    batch = EncodedBatch(images)
    captions = both.caption(batch, ["a", "b"])
    assert [len(several) for several in captions] == [2, 2]
    judged = both.judge(batch, captions)
    assert times == {captioner.encoder: 1, judge.encoder: 1}
    alone = models.judge(EncodedBatch(images), captions)
    for one, two in zip(judged, alone, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.match_probability == b.match_probability
            assert a.match_probabilities == (b.match_probability,) * 2
            assert a.filter_model == f"{judge.model}+{judge.model}"


def test_filters_vote_or_are_averaged(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    [judge] = models.filters
    said = iter([[[0.9, 0.2]], [[0.6, 0.3]], [[0.1, 0.9]]] * 2)
    monkeypatch.setattr(type(judge), "probabilities", lambda *_: next(said))
    three = Models(models.captioners, (judge,) * 3)
    captions = [[Caption(TEXTS[0]), Caption(TEXTS[1])]]
    images = {24: torch.rand(1, 3, 24, 24)}
    [mean] = three.judge(EncodedBatch(images), captions, ensemble="mean")
    [vote] = three.judge(EncodedBatch(images), captions, ensemble="vote")
    assert [c.match_probability for c in mean] == [0.533333, 0.466667]
    assert [c.match_probability for c in vote] == [0.666667, 0.333333]
    assert mean[0].match_probabilities == (0.9, 0.6, 0.1)


def test_dissimilar_captions_spare_itm(
    shard: Path, models: Models, recipe: CapfiltRecipe, tmp_path: Path
) -> None:
    process_shard(shard, tmp_path / "all", models, recipe)
    everything = [
        c for i in read_judged(tmp_path / "all" / "00000.captions.jsonl") for c in i.captions
    ]
    floor = sorted(c.similarity for c in everything)[len(everything) // 2]
    keep = recipe.keep.model_copy(update={"min_similarity": floor})
    process_shard(shard, tmp_path / "out", models, recipe.model_copy(update={"keep": keep}))
    some = [c for i in read_judged(tmp_path / "out" / "00000.captions.jsonl") for c in i.captions]
    for before, after in zip(everything, some, strict=True):
        assert after.similarity == before.similarity
        assert (after.match_probability is None) == (before.similarity < floor)
        if before.similarity >= floor:
            assert after.match_probability == pytest.approx(before.match_probability, abs=2e-6)
    assert any(c.drop_reason == "dissimilar" for c in some)
    with pytest.raises(ValueError, match="before ITM judged it"):
        rethreshold_shard(tmp_path / "out" / "00000.json", tmp_path / "new", recipe.keep)


def test_a_share_of_all_captions_is_a_threshold(
    shard: Path, models: Models, recipe: CapfiltRecipe, tmp_path: Path
) -> None:
    process_shard(shard, tmp_path / "out", models, recipe)
    threshold = threshold_of_share(manifests(tmp_path / "out"), ("web", "synthetic", "human"), 0.5)
    judged = [c for i in read_judged(tmp_path / "out" / "00000.captions.jsonl") for c in i.captions]
    alive = [c for c in judged if c.drop_reason != "empty"]
    at_least = sum(c.match_probability >= threshold for c in alive)
    assert at_least == round(0.5 * len(alive))
    with pytest.raises(ValueError, match="share is 0"):
        threshold_of_share(manifests(tmp_path / "out"), ("web",), 0)


def test_tasks_of_an_array_share_the_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    units = [Unit(str(n), Shard("x")) for n in range(10)]
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID is not set"):
        slurm_share(units, 3)
    seen: list[Unit] = []
    for task in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        seen += slurm_share(units, 3)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(ValueError, match="TASK_ID is 3, and --tasks 3"):
        slurm_share(units, 3)
    assert sorted(seen, key=lambda u: int(u.name)) == units
    script = write_plan(tmp_path / "my out", 3, ["openblip", "capfilt", "run", "a b"], 4)
    text = script.read_text()
    assert "#SBATCH --array=0-2" in text
    assert "srun openblip capfilt run 'a b'" in text


def test_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".x.tar.77.tmp").write_text("half")
    (tmp_path / ".x.77.tmp").mkdir()
    (tmp_path / "x.tar").write_text("whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_shard_that_changes_while_it_is_read_is_not_done(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe
) -> None:
    source = write_shard(tmp_path / "a.tar", "xyz")

    def change(*_: object) -> None:
        write_shard(source, "xyzw")

    with pytest.raises(ValueError, match="was changed while it was read"):
        process_shard(source, tmp_path / "out", models, recipe, on_progress=change)
    assert manifests(tmp_path / "out") == []


def test_force_leaves_nothing_of_another_kind(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe
) -> None:
    """A folder with an old tar beside new parquet would be read as the tar."""
    units = units_of(write_shard(tmp_path / "a.tar", "xyz"))
    run(units, job := Job((), (), recipe, tmp_path / "out"), models)
    parquet = replace(job, recipe=recipe.model_copy(update={"output": "parquet"}))
    run(units, parquet, models, is_forced=True)
    assert sorted(path.name for path in job.output.iterdir()) == [
        "a.captions.jsonl", "a.json", "a.parquet",
    ]  # fmt: skip


def test_another_model_cannot_retry(shard: Path, models: Models, tmp_path: Path) -> None:
    [captioner] = models.captioners
    recipe = CapfiltRecipe(decoding=captioner.decoding, prompts=captioner.prompts)
    process_shard(shard, tmp_path / "out", models, recipe)
    twice = replace(models, captioners=(captioner, captioner))
    with pytest.raises(ValueError, match=f"is of the captioner {captioner.model}, not of"):
        retry_shard(tmp_path / "out" / "00000.json", twice)


def test_a_cluster_holds_as_many_workers_as_its_scarcest_resource() -> None:
    assert room_for({"CPU": 9.0}, 2.0, 0.0) == 4
    assert room_for({"CPU": 64.0, "GPU": 2.0}, 1.0, 0.5) == 4
    assert room_for({"CPU": 64.0}, 1.0, 1.0) == 1


def test_more_captions_than_a_search_has_are_refused() -> None:
    with pytest.raises(ValidationError, match="captions_per_image is 2, and greedy decoding has 1"):
        CapfiltRecipe(decoding=Decoding(method="greedy"), captions_per_image=2)
    with pytest.raises(ValidationError, match="beam decoding has 3"):
        CapfiltRecipe(decoding=Decoding(method="beam", num_beams=3), captions_per_image=4)
    CapfiltRecipe(decoding=Decoding(method="beam", num_beams=3), captions_per_image=3)


def test_a_gpu_that_is_not_there_is_named(
    tmp_path: Path, recipe: CapfiltRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU here"):
        Job((), (), recipe, tmp_path, device="cuda").load()


def test_half_a_character_in_a_caption_leaves_json_that_anyone_reads(
    tmp_path: Path, models: Models, recipe: CapfiltRecipe
) -> None:
    cut = "a dog \ud83d"
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(Sample("x", picture(0), (Caption(cut),)))
    process_shard(tmp_path / "a.tar", tmp_path / "out", models, recipe)
    paths = OutputPaths.of("a", tmp_path / "out")
    [line] = paths.captions.read_text("utf-8").splitlines()
    assert json.loads(line)["captions"][0]["text"] == cut
    [image] = read_judged(paths.captions)
    assert image.captions[0].text == cut
