"""`openblip index`, `search` and `cluster` from the command line."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from openblip.data.sources import list_shards, read_samples
from openblip.search.index import Index
from tests.cli.conftest import Run

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}openblip (.+)$", TEXT, re.MULTILINE)
INDEX_COMMANDS = ("delete", "merge", "compact", "show", "store")


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """Return a folder of nine pictures, the last of which is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    [shard, *_] = list_shards(world / "test")
    samples = read_samples(shard, on_bad=lambda key, reason: None)
    for number, sample in enumerate(samples):
        (folder / f"picture_{number}.png").write_bytes(sample.image_bytes)
        (folder / f"picture_{number}.txt").write_text(sample.captions[0].text)
    (folder / "picture_9.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def index(run: Run, photos: Path, model: Path, tmp_path: Path) -> Path:
    """Return an index of eight pictures."""
    path = tmp_path / "index"
    assert run("index", photos, path, "--model", model).code == 0
    return path


def test_index_adds_what_is_new_and_tells_what_is_broken(
    run: Run, photos: Path, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    first = run("index", photos, path, "--model", model, "--json")
    assert (first.code, first.json["num_added"], first.json["num_images"]) == (0, 8, 8)
    assert sum(first.json["bad"].values()) == 1
    assert "not indexed: picture_9: " in first.err
    shutil.copy(photos / "picture_0.png", photos / "picture_8.png")
    shutil.copy(photos / "picture_2.png", photos / "picture_1.png")
    (photos / "picture_3.png").unlink()
    second = run("index", "add", photos, path, "--model", model, "--prune", "--json").json
    told = {name: second[f"num_{name}"] for name in ("added", "replaced", "unchanged", "pruned")}
    assert told == {"added": 1, "replaced": 1, "unchanged": 6, "pruned": 1}
    shown = run("index", "show", path, "--json").json
    assert (shown["num_images"], shown["num_deleted"], shown["model"]) == (8, 2, str(model))
    assert run("index", "compact", path).code == 0
    assert run("index", "show", path, "--json").json["num_deleted"] == 0


def test_search_by_text_picture_and_both(run: Run, photos: Path, index: Path) -> None:
    text = run("search", index, "--text", "a red circle", "--limit", 3, "--json").json
    assert len(text["hits"]) == 3
    scores = [hit["score"] for hit in text["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= hit["match_probability"] <= 1 for hit in text["hits"])
    assert "re-ranked by ITM" in text["method"]
    plain = run("search", index, "--text", "a red circle", "--no-rerank", "--json").json
    assert {hit["match_probability"] for hit in plain["hits"]} == {None}
    image = run("search", index, "--image", photos / "picture_4.png", "--json").json
    assert image["hits"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert "picture_4" in {h["key"] for h in image["hits"] if h["similarity"] > 1 - 1e-4}
    both = run(
        "search", index, "--image", photos / "picture_4.png", "--text", "blue", "--json"
    ).json
    assert both["method"].startswith("mean of picture and text")


def test_search_only_where(run: Run, index: Path) -> None:
    found = run("search", index, "--text", "a circle", "--where", "key=picture_5", "--json").json
    assert [hit["key"] for hit in found["hits"]] == ["picture_5"]
    assert found["num_searched"] == 1
    wrong = run("search", index, "--text", "a circle", "--where", "colour=red")
    assert wrong.code == 2
    assert "no image has a field 'colour'; there are key, address" in wrong.err


def test_search_writes_a_page_with_the_pictures(run: Run, index: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("search", index, "--text", "<b>circle</b>", "--html", page).code == 0
    text = page.read_text("utf-8")
    assert text.count("data:image/") == 8
    assert "<b>circle</b>" not in text


def test_a_picture_that_is_gone_is_told_and_stands_last(
    run: Run, photos: Path, index: Path
) -> None:
    (photos / "picture_6.png").unlink()
    result = run("search", index, "--text", "a circle", "--json")
    assert "not judged: picture_6 is no longer where it was indexed" in result.err
    assert result.json["hits"][-1]["key"] == "picture_6"


def test_delete_by_key_file_and_condition(run: Run, index: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("picture_0\npicture_77\n")
    deleted = run("index", "delete", index, "--keys", keys, "--key", "picture_1", "--json").json
    assert deleted == {"num_deleted": 2, "num_images": 6, "absent": ["picture_77"]}
    assert (
        run("index", "delete", index, "--where", "key=picture_2", "--json").json["num_images"] == 5
    )
    nothing = run("index", "delete", index)
    assert nothing.code == 2
    assert "nothing to delete" in nothing.err


def test_an_index_without_images_is_compacted_and_searched(run: Run, index: Path) -> None:
    assert run("index", "delete", index, "--where", "width>=1").code == 0
    assert run("index", "compact", index).code == 0
    assert len(Index.open(index)) == 0
    assert run("search", index, "--text", "a circle", "--json").json["hits"] == []
    assert run("cluster", index).code == 2


def test_merge_takes_what_is_not_there(
    run: Run, photos: Path, index: Path, model: Path, world: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert run("index", world / "human", other, "--model", model).code == 0
    num_other = len(Index.open(other))
    assert run("index", "merge", index, other, "--json").json["num_images"] == 8 + num_other
    assert run("index", "merge", index, other, "--json").json["num_added"] == 0


def test_cluster_finds_copies_whose_keys_delete_takes(
    run: Run, photos: Path, index: Path, model: Path, tmp_path: Path
) -> None:
    with Image.open(photos / "picture_2.png") as image:
        image.convert("RGB").save(photos / "picture_2_again.jpg", quality=95)
    assert run("index", photos, index, "--model", model).code == 0
    spare, page = tmp_path / "spare.txt", tmp_path / "clusters.html"
    found = run(
        "cluster", index, "--clusters", 3, "--duplicates", spare, "--html", page, "--json"
    ).json
    assert ["picture_2", "picture_2_again"] in found["duplicates"]
    assert sum(map(len, found["clusters"])) == 9
    assert "data:image/" in page.read_text("utf-8")
    assert "picture_2_again" in spare.read_text().split()
    left = run("index", "delete", index, "--keys", spare, "--json").json
    assert left["absent"] == []


def test_a_store_finds_what_the_index_finds_until_that_changes(run: Run, index: Path) -> None:
    pytest.importorskip("faiss")
    missing = run("search", index, "--text", "a circle", "--store", "faiss-hnsw")
    assert (missing.code, "has no store of faiss-hnsw" in missing.err) == (2, True)
    assert run("index", "store", index, "--kind", "faiss-hnsw").code == 0
    exact = run("search", index, "--text", "a circle", "--json").json
    stored = run("search", index, "--text", "a circle", "--store", "faiss-hnsw", "--json").json
    assert [hit["key"] for hit in stored["hits"]] == [hit["key"] for hit in exact["hits"]]
    assert run("index", "delete", index, "--key", "picture_0").code == 0
    behind = run("search", index, "--text", "a circle", "--store", "faiss-hnsw")
    assert behind.code == 2
    assert "was made before the index changed; make it anew" in behind.err


def test_a_folder_that_is_no_index_is_told(run: Run, tmp_path: Path) -> None:
    result = run("search", tmp_path, "--text", "a circle")
    assert result.code == 2
    assert "is no index: `openblip index SOURCE" in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_tutorial_and_its_options_exist(run: Run, command: str) -> None:
    words = shlex.split(command)
    names = words[: 2 if words[1] in INDEX_COMMANDS else 1]
    help_text = run(*(["index", "add"] if names == ["index"] else names), "--help").out
    known = set(re.findall(r"--[\w-]+", help_text))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_code_of_the_tutorial_runs(
    photos: Path, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    index.rename(index.with_name("photos.index"))
    monkeypatch.chdir(index.parent)
    exec(compile(code.replace("width>=600", "width>=1"), "docs/search.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5
