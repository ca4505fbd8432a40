"""Models by name, against a local server that answers as the Hub does."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from typer.testing import CliRunner

import openblip
from openblip.checkpoint import load_checkpoint, save_checkpoint
from openblip.cli import app
from openblip.convert import convert_to_transformers, read_foreign
from openblip.hub import load, push, resolve
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories by name and revision, and the paths that were asked for."""

    url: str = ""
    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path, revision: str = "main", **more: bytes) -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir()} | more
        self.repositories.setdefault(name, {})[revision] = files


def commit_of(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def files(self, name: str, revision: str) -> Files | None:
            """Return the files of a branch or commit, or answer as the Hub if there is none."""
            revisions = hub.repositories.get(name)
            if revisions is None:
                # The Hub does not tell strangers what exists: 401, as for a private model.
                self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
                return None
            for known, files in revisions.items():
                if revision in {known, commit_of(name, known)}:
                    return files
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                name = "/".join(parts[2:4])
                what, revision = parts[4:6] or ("revision", "main")
                files = self.files(name, revision)
                if files is None:
                    return
                if what == "revision":
                    self.answer_json({"id": name, "sha": commit_of(name, revision)})
                else:
                    self.answer_json(
                        [
                            {"type": "file", "path": file, "size": len(data), "oid": file}
                            for file, data in files.items()
                        ]
                    )
                return
            if len(parts) < 5:
                self.answer(404, b"", {})
                return
            name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            files = self.files(name, revision)
            if files is not None:
                tag = hashlib.sha1(files[file]).hexdigest()
                self.answer(200, files[file], {"ETag": f'"{tag}"', "X-Repo-Commit": revision})

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            hub.asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != "Bearer hf_of_a_test":
                self.answer(403, b'{"error": "no write token"}', {})
            elif self.path == "/api/repos/create":
                value = json.loads(body)
                assert "private" in (value.get("visibility"), *value)
                name = f"{value['organization']}/{value['name']}"
                hub.repositories[name] = {"main": {}}
                self.answer_json({"url": f"{hub.url}/{name}"})
            elif self.path == "/api/validate-yaml":
                self.answer_json({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer_json({"files": files})
            else:
                name = "/".join(self.path.split("/")[3:5])
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        data = base64.b64decode(entry["value"]["content"])
                        hub.repositories[name]["main"][entry["value"]["path"]] = data
                commit = commit_of(name, "main")
                url = f"{hub.url}/{name}/commit/{commit}"
                self.answer_json({"success": True, "commitUrl": url, "commitOid": commit})

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # The library reads its environment once, at import.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield hub
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(reference: Path, tmp_path: Path) -> Path:
    converted = read_foreign(reference / "pretrain_init.safetensors")
    save_checkpoint(tmp_path / "model", converted.model, converted.tokenizer, "# A card\n")
    return tmp_path / "model"


def same(pair: tuple[Blip, Tokenizer], folder: Path) -> bool:
    expected = load_checkpoint(folder)[0].state_dict()
    found = pair[0].state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in found
    )


def test_a_folder_is_itself(model: Path, hub: Hub) -> None:
    assert resolve(model) == model
    assert same(openblip.load(str(model)), model)
    with pytest.raises(ValueError, match="has no revision 'v1'"):
        resolve(model, revision="v1")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        load(model / "config.json")
    assert not hub.asked


def test_a_name_is_downloaded_once_and_only_what_is_read(model: Path, hub: Hub) -> None:
    hub.add("someone/blip", model, **{"train_state.bin": b"x" * 100, "tf_model.h5": b"y"})
    assert same(load("someone/blip"), model)
    folder = resolve("someone/blip")
    assert {path.name for path in folder.iterdir()} == {path.name for path in model.iterdir()}
    num_weights = sum(path.endswith("model.safetensors") for path in hub.asked)
    assert same(load("someone/blip"), model)
    assert sum(path.endswith("model.safetensors") for path in hub.asked) == num_weights


def test_a_revision_is_pinned(model: Path, hub: Hub) -> None:
    hub.add("someone/blip", model)
    (model / "README.md").write_text("# Another card\n")
    hub.add("someone/blip", model, revision="v2")
    cards = [resolve("someone/blip", revision=r) / "README.md" for r in (None, "main", "v2")]
    assert [card.read_text() for card in cards] == ["# A card\n", "# A card\n", "# Another card\n"]
    commit = commit_of("someone/blip", "v2")
    assert resolve("someone/blip", revision=commit) == cards[2].parent
    with pytest.raises(ValueError, match="someone/blip has no revision 'v3' on the Hub"):
        resolve("someone/blip", revision="v3")


def test_names_that_lead_nowhere(hub: Hub) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a model of the Hub"):
        load("someone/nothing")
    with pytest.raises(ValueError, match="neither a folder nor a name of the Hub"):
        load("./runs/a model/that/is/not/there")


def test_offline(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("someone/blip", model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="someone/blip is not in the cache, and the Hub is off"):
        load("someone/blip")
    assert not hub.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load("someone/blip")
    num_asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load("someone/blip"), model)
    assert len(hub.asked) == num_asked
    with pytest.raises(ValueError, match="at revision 'v2' is not in the cache"):
        load("someone/blip", revision="v2")


def test_the_environment_is_honoured(model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add("someone/blip", model)
    program = "import openblip; print(openblip.load('someone/blip')[0].config.embedding_width)"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == load_checkpoint(model)[0].config.embedding_width


def test_a_transformers_folder_is_converted_in_memory(
    model: Path, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / "theirs"
    convert_to_transformers(model, theirs, architecture="BlipForImageTextRetrieval")
    hub.add("someone/theirs", theirs, **{"pytorch_model.bin": b"never read"})
    with caplog.at_level("INFO", "openblip"):
        blip, tokenizer = openblip.load("someone/theirs")
    assert "[CLS] first" in caplog.text
    own = load_checkpoint(model)[0].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in blip.state_dict().items())
    assert tokenizer.encode("a cat") == load_checkpoint(model)[1].encode("a cat")
    folder = resolve("someone/theirs")
    assert not (folder / "pytorch_model.bin").exists()
    names = {path.name for path in theirs.iterdir()} - {"preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    # Without safetensors the pickle is fetched, and read as weights only.
    torch.save(load_file(theirs / "model.safetensors"), tmp_path / "weights.bin")
    files = dict(hub.repositories["someone/theirs"]["main"])
    del files["model.safetensors"]
    files["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    hub.repositories["someone/pickled"] = {"main": files}
    again = load("someone/pickled")[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in blip.state_dict().items())


def test_push(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "train_state").mkdir()
    (model / "train_state" / "secret.pt").write_bytes(b"x")
    (model / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match="someone/mine was not uploaded"):
        push(model, "someone/mine")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    assert push(model, "someone/mine") == f"{hub.url}/someone/mine"
    uploaded = hub.repositories["someone/mine"]["main"]
    assert uploaded == {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    assert same(load("someone/mine"), model)
    (model / "README.md").unlink()
    with pytest.raises(ValueError, match=r"lacks README\.md"):
        push(model, "someone/mine")


def front_of(card: bytes) -> dict[str, object]:
    """Return the front matter of a card."""
    _, front, _ = card.decode().split("---\n", 2)
    values = yaml.safe_load(front)
    assert isinstance(values, dict)
    return values


def test_push_with_a_filled_card(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    recipe = "data:\n- /home/me/secret/pairs\ninit: runs/base\nnum_steps: 12\n"
    (model / "README.md").write_text(
        f"# mine\n\n- it starts from /home/me/x.\n\n```yaml\n{recipe}```\n"
    )
    log = model.with_name("model.log.jsonl")
    log.write_text(
        '{"step": 11, "loss": 1.23456}\n{"step": 11, "evaluation": {"criterion": 2.5}}\n'
    )
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "model.json").write_text('{"accuracy": 61.5, "num_judged": 8}')
    done = CliRunner().invoke(app, ["push", str(model), "me/mine", "--license", "mit", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["url"] == f"{hub.url}/me/mine"
    uploaded = hub.repositories["me/mine"]["main"]
    assert set(uploaded) == set(answer["files"])
    assert uploaded["README.md"].decode() == answer["card"]
    assert front_of(uploaded["README.md"]) == {
        "library_name": "openblip", "pipeline_tag": "image-feature-extraction",
        "tags": ["blip", "openblip", "image-captioning", "image-text-retrieval",
                 "image-text-matching"],
        "license": "mit",
    }  # fmt: skip
    for told in ("| data | pairs |", "| starts from | runs/base |", "| optimizer steps | 12 |",
                 "step 11, loss 1.235", "| accuracy, % | 61.5 |", "| criterion | 2.5 |",
                 'engine = openblip.load_engine("me/mine")',
                 "openblip caption photos/ --model me/mine", "it starts from x"):  # fmt: skip
        assert told in answer["card"], told
    assert "/home" not in answer["card"]
    assert same(load("me/mine"), model)


def test_push_of_a_transformers_folder_and_a_dry_run(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    theirs = tmp_path / "theirs"
    convert_to_transformers(model, theirs, architecture="BlipForConditionalGeneration")
    (theirs / "pytorch_model.bin").write_bytes(b"never pushed")
    dry = CliRunner().invoke(app, ["push", str(theirs), "me/theirs", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "BlipForConditionalGeneration.from_pretrained" in dry.stdout
    assert not hub.asked
    done = CliRunner().invoke(app, ["push", str(theirs), "me/theirs"])
    assert done.exit_code == 0, done.output
    uploaded = hub.repositories["me/theirs"]["main"]
    assert set(uploaded) == {path.name for path in theirs.iterdir()} - {"pytorch_model.bin"}
    assert front_of(uploaded["README.md"])["library_name"] == "transformers"
    assert "decode" in load("me/theirs")[0].config.text.roles
    mine = tmp_path / "card.md"
    mine.write_text("# Mine\n")
    refused = CliRunner().invoke(
        app, ["push", str(theirs), "me/x", "--card", str(mine), "--license", "mit"]
    )
    assert refused.exit_code == 2
    assert "not into" in refused.stderr
    missing = CliRunner().invoke(app, ["push", str(tmp_path / "gone"), "me/x"])
    assert (missing.exit_code, "is no folder" in missing.stderr) == (2, True)
