"""ONNX exports against the same model in PyTorch, through the same engine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from openblip.backend import TorchBackend
from openblip.checkpoint import save_checkpoint, with_roles
from openblip.generation import Decoding
from openblip.hub import load_engine
from openblip.inference import Engine
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.onnx_backend import OnnxBackend
from openblip.onnx_export import compare, export_onnx
from openblip.tokenizer import Tokenizer

# One worker exports once for all tests.
pytestmark = pytest.mark.xdist_group("onnx")

TOLERANCE = 1e-4
# Of a model of random weights, whose int8 errors nothing has been trained to bear.
INT8_TOLERANCE = 0.15
DECODINGS = [
    Decoding(method="greedy"),
    Decoding(method="beam", num_beams=3),
    Decoding(method="nucleus", top_p=0.95),
]
TEXTS = [["w1", "w2 w3 w4 w5", "w9 w8"], ["w7"], ["w3 w3 w20 w21 w22 w23", "w11 w12"]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["a", "picture", "of", *(f"w{i}" for i in range(50))]
    return Tokenizer.from_vocabulary(special + words)


@pytest.fixture(scope="module")
def blip(tokenizer: Tokenizer) -> Blip:
    torch.manual_seed(0)
    vision = VisionConfig(32, 8, width=64, num_layers=2, num_heads=4, init_std=0.15)
    text = MedConfig(
        vocab_size=60, width=96, num_layers=2, num_heads=4, ffn_width=384, max_positions=40,
        context_width=64, init_std=0.2,
    )  # fmt: skip
    return Blip(BlipConfig(vision, text, tokenizer.special, embedding_width=16)).eval()


@pytest.fixture(scope="module")
def exported(
    blip: Blip, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(blip, tokenizer, folder / "float32")
    export_onnx(blip, tokenizer, folder / "int8", precision="int8")
    return {name: folder / name for name in ("float32", "int8")}


@pytest.fixture(scope="module")
def eager(blip: Blip, tokenizer: Tokenizer) -> Engine:
    return Engine(blip, tokenizer, dtype="float32")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_float32_embeds_and_matches_as_pytorch(
    exported: dict[str, Path], eager: Engine, images: torch.Tensor, batch_size: int
):
    engine = load_engine(exported["float32"], batch_size=batch_size)
    assert engine.precision == "float32"
    ours, theirs = eager.encode(images), engine.encode(images)
    assert (ours.states - theirs.states).abs().max() < TOLERANCE
    assert (eager.embed_images(images) - engine.embed_images(images)).abs().max() < TOLERANCE
    texts = [text for several in TEXTS for text in several]
    assert (eager.embed_texts(texts) - engine.embed_texts(texts)).abs().max() < TOLERANCE
    for a, b in zip(eager.match(images, TEXTS), engine.match(images, TEXTS), strict=True):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert one.match_probability == pytest.approx(other.match_probability, abs=TOLERANCE)
            assert one.similarity == pytest.approx(other.similarity, abs=TOLERANCE)
    matrices = eager.match_matrix(images, texts), engine.match_matrix(images, texts)
    assert (matrices[0] - matrices[1]).abs().max() < TOLERANCE
    assert matrices[0].std() > 100 * TOLERANCE  # else equal numbers would say nothing


@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda decoding: decoding.method)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_float32_captions_as_pytorch(
    exported: dict[str, Path],
    eager: Engine,
    images: torch.Tensor,
    decoding: Decoding,
    batch_size: int,
):
    engine = load_engine(exported["float32"], batch_size=batch_size)
    number = 1 if decoding.method == "greedy" else 2
    ours = eager.caption(images, decoding=decoding, captions_per_image=number)
    theirs = engine.caption(images, decoding=decoding, captions_per_image=number)
    for a, b in zip(ours, theirs, strict=True):
        assert [one.text for one in a] == [one.text for one in b]
        for one, other in zip(a, b, strict=True):
            assert one.token_log_probabilities == pytest.approx(
                other.token_log_probabilities, abs=TOLERANCE
            )


def test_rows_may_come_after_the_prompt_and_images_may_leave(
    exported: dict[str, Path], blip: Blip, images: torch.Tensor
):
    found = []
    for backend in (TorchBackend(blip, "float32"), OnnxBackend(exported["float32"], threads=1)):
        context = backend.project_context(backend.encode_images(images))
        cache = backend.new_decoder_cache()
        prompt = torch.tensor([[blip.config.tokens.dec, 7, 8]] * 3)
        logits = [backend.decode_step(prompt, cache, context)]
        cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
        following = torch.tensor([[9], [10], [11], [12], [13], [14]])
        logits.append(backend.decode_step(following, cache, context))
        cache.reorder(torch.tensor([1, 0, 5, 4]))
        kept = context.select(torch.tensor([0, 2]))
        logits.append(backend.decode_step(following[:4], cache, kept))
        assert cache.num_tokens == 5
        found.append(torch.cat(logits))
    assert (found[0] - found[1]).abs().max() < TOLERANCE


def test_a_wrong_number_of_rows_or_of_tokens_is_named(
    exported: dict[str, Path], images: torch.Tensor
):
    backend = OnnxBackend(exported["float32"])
    context = backend.project_context(backend.encode_images(images))
    with pytest.raises(ValueError, match="4 rows of text are not a multiple of 3 images"):
        backend.decode_step(
            torch.ones(4, 1, dtype=torch.long), backend.new_decoder_cache(), context
        )
    with pytest.raises(ValueError, match="41 tokens, the model has 40 positions"):
        backend.decode_step(
            torch.ones(3, 41, dtype=torch.long), backend.new_decoder_cache(), context
        )
    with pytest.raises(ValueError, match="the model takes"):
        backend.encode_images(torch.zeros(1, 3, 16, 16))


def test_int8_is_near_smaller_and_does_not_depend_on_the_batch(
    exported: dict[str, Path], blip: Blip, images: torch.Tensor
):
    differences = compare(TorchBackend(blip, "float32"), OnnxBackend(exported["int8"]))
    assert 0 < differences.largest < INT8_TOLERANCE
    sizes = {
        name: sum(path.stat().st_size for path in folder.iterdir())
        for name, folder in exported.items()
    }
    assert sizes["int8"] < 0.7 * sizes["float32"]
    engine = load_engine(exported["int8"], batch_size=3)
    assert engine.precision == "int8"
    alone = [engine.encode(images[i : i + 1]).states for i in range(3)]
    assert torch.equal(engine.encode(images).states, torch.cat(alone))
    judged = engine.match(images, TEXTS)
    for i in range(3):
        assert engine.match(images[i : i + 1], [TEXTS[i][-1:]])[0][0] == judged[i][-1]
    captions = engine.caption(images)
    assert [engine.caption(images[i : i + 1])[0] for i in range(3)] == captions


def test_a_captioner_is_exported_with_its_parts_alone(
    blip: Blip, tokenizer: Tokenizer, images: torch.Tensor, tmp_path: Path
):
    captioner = with_roles(blip, frozenset({"decode"})).eval()
    report = export_onnx(captioner, tokenizer, tmp_path / "captioner")
    names = {name for name in report.files if name.endswith(".onnx")}
    assert names == {"image_encoder.onnx", "context.onnx", "decoder.onnx"}
    assert report.differences.match_probability is None
    engine = load_engine(tmp_path / "captioner")
    assert (
        engine.caption(images)[0][0].text == Engine(captioner, tokenizer).caption(images)[0][0].text
    )
    with pytest.raises(ValueError, match="no role 'pair'"):
        engine.match_matrix(images, ["w1"])
    with pytest.raises(ValueError, match="no role 'text'"):
        engine.embed_texts(["w1"])
    with pytest.raises(ValueError, match="PyTorch alone"):
        engine.refine(images, ["w1"] * 3)


def test_files_tell_nothing_of_this_machine(exported: dict[str, Path]):
    for path in exported["float32"].iterdir():
        assert str(Path(__file__).parent.parent).encode() not in path.read_bytes()


def test_what_is_there_already_is_kept(blip: Blip, tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists: choose another name"):
        export_onnx(blip, tokenizer, tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_an_export_that_is_far_from_the_model_is_removed(
    blip: Blip, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    captioner = with_roles(blip, frozenset({"decode"})).eval()
    right = OnnxBackend.encode_images
    monkeypatch.setattr(OnnxBackend, "encode_images", lambda *args: right(*args) + 0.1)
    with pytest.raises(ValueError, match="was removed"):
        export_onnx(captioner, tokenizer, tmp_path / "far")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(
    exported: dict[str, Path],
    blip: Blip,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"pip install 'openblip\[onnx\]'"):
        export_onnx(blip, tokenizer, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    if library == "onnxruntime":
        with pytest.raises(ValueError, match=r"pip install 'openblip\[onnx\]'"):
            load_engine(exported["float32"])


def test_a_damaged_folder_is_named(exported: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(exported["float32"], folder)
    with pytest.raises(ValueError, match="was exported in float32, and cannot be run in int8"):
        load_engine(folder, dtype="int8")
    whole = (folder / "decoder.onnx").read_bytes()
    (folder / "decoder.onnx").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"decoder.onnx has \d+ bytes, expected"):
        load_engine(folder)
    (folder / "decoder.onnx").write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=r"decoder.onnx cannot be loaded"):
        load_engine(folder).caption(torch.zeros(1, 3, 32, 32))
    (folder / "decoder.onnx").unlink()
    with pytest.raises(ValueError, match=r"is not whole: it lacks decoder.onnx"):
        load_engine(folder)
    (folder / "onnx.json").write_text("{}")
    with pytest.raises(ValueError, match=r"onnx.json: .*format"):
        load_engine(folder)
    with pytest.raises(ValueError, match=r"lacks onnx\.json"):
        OnnxBackend(tmp_path)
    with pytest.raises(ValueError, match="threads 0 must be at least 1"):
        OnnxBackend(exported["float32"], threads=0)


def test_the_command_writes_what_captions_as_the_checkpoint(
    blip: Blip, tokenizer: Tokenizer, tmp_path: Path
):
    captioner = with_roles(blip, frozenset({"decode"})).eval()
    save_checkpoint(tmp_path / "model", captioner, tokenizer, "A model of random weights.")
    command = [sys.executable, "-m", "openblip", "export", "onnx"]
    arguments = [str(tmp_path / "model"), str(tmp_path / "exported"), "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["precision"] == "float32"
    assert result["differences"]["decoder_logits"] < TOLERANCE
    for name, size in result["files"].items():
        assert (tmp_path / "exported" / name).stat().st_size == size
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    eager, engine = (
        load_engine(tmp_path / name, dtype="float32") for name in ("model", "exported")
    )
    [[ours]], [[theirs]] = eager.caption([image]), engine.caption([image])
    assert ours.text == theirs.text
    again = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists" in again.stderr
