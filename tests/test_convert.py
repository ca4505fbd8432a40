"""Conversion of the reference's official checkpoint and of transformers folders, and its errors."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openblip.checkpoint import (
    load_checkpoint,
    load_nlvr_checkpoint,
    load_vqa_checkpoint,
    save_checkpoint,
    with_roles,
)
from openblip.convert import (
    convert_to_openblip,
    convert_to_transformers,
    from_official,
    official_names,
    read_foreign,
    to_official,
)
from openblip.convert_official import config_from_tensors, nlvr_config, official_kind
from openblip.convert_vocabulary import read_vocabulary
from openblip.convert_weights import listing, mlp_ratio_of, nlvr_names, vqa_names
from openblip.models.blip import Blip, BlipConfig
from openblip.models.nlvr import Nlvr, NlvrConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer

Tensors = dict[str, Tensor]


@pytest.fixture
def official(reference: Path) -> Tensors:
    return load_file(reference / "pretrain_init.safetensors")


@pytest.fixture
def beside(reference: Path, tmp_path: Path) -> Path:
    """Return a folder with the configuration and the vocabulary, where tests put weights."""
    folder = tmp_path / "released"
    folder.mkdir()
    for name in ("config.json", "vocab.txt"):
        shutil.copyfile(reference / name, folder / name)
    return folder


def only(tensors: Tensors, *tops: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name.split(".")[0] in tops}


def test_the_pretraining_checkpoint_becomes_a_folder(reference: Path, tmp_path: Path) -> None:
    report = convert_to_openblip(
        reference / "pretrain_init.safetensors",
        tmp_path / "model",
        config=reference / "config.json",
        vocabulary=reference / "vocab.txt",
    )
    blip, tokenizer = load_checkpoint(tmp_path / "model")
    tensors = load_file(reference / "pretrain_init.safetensors")
    expected = from_official(tensors, official_names(blip.config))
    assert all(torch.equal(value, expected[name]) for name, value in blip.state_dict().items())
    ids = json.loads((reference / "config.json").read_text())["special_token_ids"]
    assert (tokenizer.special.dec, tokenizer.special.enc) == (ids["dec_bos"], ids["enc"])
    assert report.kind == "pretrain"
    assert report.roles == ("decode", "pair", "text")
    assert report.num_parameters == sum(p.numel() for p in blip.parameters())
    # Every tensor of the file is accounted for.
    num_read = sum(len(parts) for parts in official_names(blip.config).values())
    assert num_read + sum(report.left_out.values()) == len(tensors)
    assert set(report.left_out) == {
        "momentum twin", "queue", "position_ids buffer", "tied duplicate",
    }  # fmt: skip
    assert json.loads(json.dumps(report.to_json()))["kind"] == "pretrain"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pretrain_init.safetensors" in card
    assert f"{report.num_parameters:,}" in card
    with pytest.raises(ValueError, match="exists"):
        convert_to_openblip(reference / "pretrain_init.safetensors", tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "tops", "roles"),
    [
        ("caption", ["text_decoder"], ("decode",)),
        (
            "retrieval",
            ["text_encoder", "vision_proj", "text_proj", "itm_head", "temp", "text_encoder_m"],
            ("pair", "text"),
        ),
        ("itm", ["text_encoder", "vision_proj", "text_proj", "itm_head"], ("pair", "text")),
        ("base", ["text_encoder"], ("pair", "text")),
    ],
)
def test_each_kind_from_a_pth_file(
    kind: str, tops: list[str], roles: tuple[str, ...], official: Tensors, beside: Path
) -> None:
    tensors = only(official, "visual_encoder", *tops)
    torch.save({"model": tensors, "epoch": 3, "config": {"vit": "base"}}, beside / "wrapped.pth")
    torch.save(tensors, beside / "bare.pth")
    converted = read_foreign(beside / "wrapped.pth")
    assert (converted.report.kind, converted.report.roles) == (kind, roles)
    assert not converted.model.training
    again = read_foreign(beside / "bare.pth").model.state_dict()
    own = converted.model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in own.items())
    assert torch.equal(own["vision.class_token"], official["visual_encoder.cls_token"])
    told = " ".join(converted.report.notes)
    assert ("no temperature" in told) == (kind in {"itm", "base"})
    assert ("drawn anew" in told) == (kind == "base")
    if kind == "base":
        assert own["match_head.weight"].std() > 0.001
        assert own["match_head.bias"].abs().sum() == 0


def test_the_model_of_vqa(reference: Path, beside: Path, tmp_path: Path) -> None:
    tensors = load_file(reference / "vqa_init.safetensors")
    torch.save({"model": tensors}, beside / "vqa.pth")
    report = convert_to_openblip(beside / "vqa.pth", tmp_path / "model")
    assert (report.kind, report.roles) == ("vqa", ("decode", "pair"))
    assert report.left_out == {"position_ids buffer": 2, "tied duplicate": 2}
    vqa, _ = load_vqa_checkpoint(tmp_path / "model")
    names = vqa_names(vqa.config)
    expected = from_official(tensors, names)
    assert all(torch.equal(value, expected[name]) for name, value in vqa.state_dict().items())
    assert sum(map(len, names.values())) + 4 == len(tensors)
    assert vqa.config.answer.context_width == vqa.config.question.width
    with pytest.raises(ValueError, match="a model for vqa, expected no task"):
        load_checkpoint(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipeline_tag: visual-question-answering" in card
    tensors["text_decoder.cls.predictions.decoder.bias"][0] += 1
    del tensors["text_encoder.embeddings.LayerNorm.bias"]
    torch.save(tensors, beside / "vqa.pth")
    with pytest.raises(ValueError, match=r"decoder\.bias differs .*missing text_encoder\.embedd"):
        read_foreign(beside / "vqa.pth")


def test_the_model_of_nlvr2(reference: Path, beside: Path, tmp_path: Path) -> None:
    values = json.loads((reference / "config.json").read_text())
    (beside / "config.json").write_text(
        json.dumps(values | {"med_config": values["nlvr_med_config"]})
    )
    tensors = load_file(reference / "nlvr_init.safetensors")
    torch.save({"model": tensors}, beside / "nlvr.pth")
    report = convert_to_openblip(beside / "nlvr.pth", tmp_path / "model")
    assert (report.kind, report.roles) == ("nlvr", ("pair",))
    assert report.left_out == {"position_ids buffer": 1}
    nlvr, _ = load_nlvr_checkpoint(tmp_path / "model")
    merging = json.loads((reference / "nlvr.json").read_text())["layers_with_merge_layer"]
    assert nlvr.config.first_merge_layer == merging[0]
    expected = from_official(tensors, nlvr_names(nlvr.config))
    assert all(torch.equal(value, expected[name]) for name, value in nlvr.state_dict().items())
    assert sum(map(len, nlvr_names(nlvr.config).values())) + 1 == len(tensors)
    with pytest.raises(ValueError, match="a model for nlvr, expected no task"):
        load_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="a model for nlvr, expected no task"):
        convert_to_transformers(tmp_path / "model", tmp_path / "theirs")
    cross = f"text_encoder.encoder.layer.{merging[-1]}.crossattention"
    del tensors[f"{cross}.output.merge_layer.bias"]
    tensors[f"{cross}.self2.query.bias"] = torch.zeros(1)
    torch.save(tensors, beside / "nlvr.pth")
    with pytest.raises(ValueError, match=r"missing .*merge_layer\.bias; extra .*self2") as caught:
        read_foreign(beside / "nlvr.pth")
    assert str(beside) in str(caught.value)


def test_the_sizes_of_a_model_of_nlvr2_are_in_its_tensors() -> None:
    tokens = SpecialTokens(pad=0, cls=1, sep=2, dec=3, enc=4)
    for first_merge_layer in (1, 6):
        config = NlvrConfig(
            VisionConfig(image_size_px=32, patch_size_px=16, width=128, num_layers=1, num_heads=2),
            MedConfig(
                vocab_size=9, width=64, num_layers=3, num_heads=1, ffn_width=8, max_positions=7,
                context_width=128, roles=frozenset({"pair"}),
            ),
            tokens,
            first_merge_layer,
        )  # fmt: skip
        tensors = to_official(Nlvr(config).state_dict(), nlvr_names(config))
        assert official_kind(tensors) == "nlvr"
        sizes = config_from_tensors(tensors, tokens).with_roles(frozenset({"pair"}))
        assert nlvr_config(sizes, tensors) == config


def test_repeats_that_are_absent_are_not_missed(official: Tensors, beside: Path) -> None:
    # Savers that keep shared memory once may keep either name.
    head = "text_decoder.cls.predictions"
    del official[f"{head}.bias"], official[f"{head}.decoder.weight"]
    del official["text_encoder.embeddings.word_embeddings.weight"]
    save_file(official, beside / "model.safetensors")
    own = read_foreign(beside / "model.safetensors").model.state_dict()
    assert torch.equal(own["text.lm_head.bias"], official[f"{head}.decoder.bias"])
    words = official["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(own["text.word_embedding.weight"], words)


def test_what_does_not_fit_is_listed(official: Tensors, beside: Path) -> None:
    official["stranger"] = torch.zeros(1)
    del official["itm_head.bias"]
    [width] = official["visual_encoder.norm.bias"].shape
    official["visual_encoder.norm.bias"] = torch.zeros(3)
    official["temp"] = torch.tensor(1)
    tied = "text_decoder.bert.encoder.layer.1.output.dense.bias"
    official[tied] = official[tied] + 1
    save_file(official, beside / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing itm_head\.bias") as caught:
        read_foreign(beside / "model.safetensors")
    for expected in (
        "extra stranger",
        f"visual_encoder.norm.bias is (3,), expected ({width},)",
        "temp is torch.int64",
        f"{tied} differs from {tied.replace('text_decoder.bert', 'text_encoder')}",
    ):
        assert expected in str(caught.value)


def test_long_listings_are_cut_and_counted() -> None:
    assert listing([str(i) for i in range(8)]) == "0; 1; 2; 3; 4; 5; 6; 7"
    assert listing([str(i) for i in range(10)]).endswith("7; and 2 more")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_refused_and_does_not_run(beside: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": {"temp": torch.tensor(0.07)}, "extra": Harmful()}, beside / "a.pth")
    (beside / "b.pth").write_bytes(pickle.dumps(Harmful()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(ValueError, match="could run its code"):
            read_foreign(beside / name)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_weights(official: Tensors, beside: Path) -> None:
    (beside / "text.safetensors").write_text("no weights")
    (beside / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    torch.save([1], beside / "list.pth")
    torch.save({"temp": 3}, beside / "number.pth")
    for name, expected in {
        "text.safetensors": "text.safetensors: ",
        "cut.pth": "cannot be read",
        "list.pth": "holds no tensors by name",
        "number.pth": "not tensors: temp",
        "absent.pth": "no weights at",
    }.items():
        with pytest.raises(ValueError, match=expected):
            read_foreign(beside / name)
    strange = only(official, "visual_encoder", "text_decoder", "itm_head")
    save_file(strange, beside / "strange.safetensors")
    with pytest.raises(ValueError, match="no pre-training, captioning, retrieval"):
        read_foreign(beside / "strange.safetensors")


def test_sizes_from_the_tensors_need_heads_of_64(official: Tensors, beside: Path) -> None:
    width = official["visual_encoder.norm.bias"].shape[0]
    assert width % 64
    save_file(official, beside / "model.safetensors")
    (beside / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{width} wide, not a multiple of 64"):
        read_foreign(beside / "model.safetensors")
    del official["visual_encoder.pos_embed"]
    save_file(official, beside / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing visual_encoder\.pos_embed"):
        read_foreign(beside / "model.safetensors")


def test_sizes_from_the_tensors_of_a_wide_model(beside: Path, reference: Path) -> None:
    words = (reference / "vocab.txt").read_text().split()
    tokenizer = Tokenizer.from_vocabulary(words)
    config = BlipConfig(
        vision=VisionConfig(
            image_size_px=24, patch_size_px=8, width=128, num_layers=2, num_heads=2, mlp_ratio=2.0
        ),
        text=MedConfig(
            vocab_size=tokenizer.vocab_size, width=64, num_layers=1, num_heads=1, ffn_width=96,
            max_positions=20, context_width=128,
        ),
        tokens=tokenizer.special,
        embedding_width=12,
    )  # fmt: skip
    tensors = to_official(Blip(config).state_dict(), official_names(config))
    save_file({name: value.clone() for name, value in tensors.items()}, beside / "wide.safetensors")
    (beside / "config.json").unlink()
    converted = read_foreign(beside / "wide.safetensors")
    assert converted.model.config == config
    assert "2 for images, 1 for text" in converted.report.notes[0]


def test_odd_mlp_widths_survive_as_a_ratio() -> None:
    assert all(
        int(width * mlp_ratio_of(hidden, width)) == hidden
        for width in range(8, 400, 8)
        for hidden in range(1, 4 * width, 3)
    )


def test_vocabularies(official: Tensors, beside: Path, tmp_path: Path) -> None:
    save_file(official, beside / "model.safetensors")
    words = (beside / "vocab.txt").read_text().split()
    Tokenizer.from_vocabulary(words).save(tmp_path / "tokenizer.json")
    (beside / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no vocab\.txt or tokenizer\.json: give the model"):
        read_foreign(beside / "model.safetensors")
    found = read_foreign(beside / "model.safetensors", vocabulary=tmp_path / "tokenizer.json")
    assert found.tokenizer.encode("a red cat") == Tokenizer.from_vocabulary(words).encode(
        "a red cat"
    )
    (tmp_path / "short.txt").write_text("\n".join(words[:-1]) + "\n")
    with pytest.raises(ValueError, match=f"the vocabulary {len(words) + 1} and"):
        read_foreign(beside / "model.safetensors", vocabulary=tmp_path / "short.txt")
    with pytest.raises(ValueError, match="no vocabulary at"):
        read_foreign(beside / "model.safetensors", vocabulary=tmp_path / "none.txt")
    cased = json.loads((tmp_path / "tokenizer.json").read_text())
    cased["normalizer"]["lowercase"] = False
    (tmp_path / "cased.json").write_text(json.dumps(cased))
    with pytest.raises(ValueError, match="lower-casing"):
        read_foreign(beside / "model.safetensors", vocabulary=tmp_path / "cased.json")


def test_bert_vocabulary_gets_the_released_ids(shared: Path) -> None:
    tokenizer = read_vocabulary(shared / "data" / "bert-base-uncased-vocab.txt", shared, ())
    assert tokenizer.vocab_size == 30524
    assert (tokenizer.special.dec, tokenizer.special.enc) == (30522, 30523)
    assert (tokenizer.special.cls, tokenizer.special.sep) == (101, 102)


@pytest.fixture
def ours(reference: Path, tmp_path: Path) -> Path:
    """Return our folder of the reference's model, its temperature set."""
    converted = read_foreign(reference / "pretrain_init.safetensors")
    with torch.no_grad():
        converted.model.temperature.fill_(0.123)
    save_checkpoint(tmp_path / "ours", converted.model, converted.tokenizer, "# A card\n")
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("architecture", "roles"),
    [
        ("BlipForConditionalGeneration", frozenset({"decode"})),
        ("BlipForImageTextRetrieval", frozenset({"text", "pair"})),
    ],
)
def test_there_and_back_through_transformers(
    architecture: str, roles: frozenset[str], ours: Path, tmp_path: Path
) -> None:
    report = convert_to_transformers(ours, tmp_path / "theirs", architecture=architecture)
    assert report.left_out["of other roles"] > 0
    back = convert_to_openblip(tmp_path / "theirs", tmp_path / "back")
    assert back.kind == report.kind == architecture
    assert back.num_parameters == report.num_parameters
    assert not back.left_out
    blip, tokenizer = load_checkpoint(ours)
    part, (again, words) = with_roles(blip, roles), load_checkpoint(tmp_path / "back")
    assert again.config == part.config
    assert again.state_dict().keys() == part.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in part.state_dict().items())
    assert words.encode("a Red cat, isn't it?") == tokenizer.encode("a Red cat, isn't it?")
    # A model that has just these roles needs no architecture, and gives the same bytes.
    convert_to_transformers(tmp_path / "back", tmp_path / "theirs2")
    for name in ("model.safetensors", "config.json", "vocab.txt", "tokenizer.json"):
        assert (tmp_path / "theirs2" / name).read_bytes() == (
            tmp_path / "theirs" / name
        ).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} >= {"ours", "theirs", "back", "theirs2"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_sharded_and_pickled_transformers_folders(ours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    convert_to_transformers(ours, folder, architecture="BlipForImageTextRetrieval")
    whole = read_foreign(folder).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    pickled = read_foreign(folder).model.state_dict()
    (folder / "pytorch_model.bin").unlink()
    shards = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for index, (name, value) in enumerate(tensors.items()):
        shards[f"model-{1 + index % 2}.safetensors"][name] = value
    for name, values in shards.items():
        save_file(values, folder / name)
    index = {name: shard for shard, values in shards.items() for name in values}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sharded = read_foreign(folder).model.state_dict()
    assert all(torch.equal(v, pickled[k]) and torch.equal(v, sharded[k]) for k, v in whole.items())
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights at"):
        read_foreign(folder)


def test_halved_weights_are_widened_and_told(ours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    convert_to_transformers(ours, folder, architecture="BlipForConditionalGeneration")
    tensors = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    converted = read_foreign(folder)
    assert {p.dtype for p in converted.model.parameters()} == {torch.float32}
    assert "weights of torch.float16 became torch.float32" in converted.report.notes


def test_transformers_folders_that_do_not_fit(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose an architecture"):
        convert_to_transformers(ours, tmp_path / "theirs")
    folder = tmp_path / "theirs"
    convert_to_transformers(ours, folder, architecture="BlipForConditionalGeneration")
    with pytest.raises(ValueError, match="exists"):
        convert_to_transformers(ours, folder, architecture="BlipForConditionalGeneration")
    with pytest.raises(ValueError, match="of its own"):
        read_foreign(folder, config=folder / "config.json")
    with pytest.raises(ValueError, match="model_type is None, expected 'blip'"):
        read_foreign(ours)
    values = json.loads((folder / "config.json").read_text())

    def edited(**changes: Any) -> None:
        text = values["text_config"] | changes
        (folder / "config.json").write_text(json.dumps(values | {"text_config": text}))

    edited(hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        read_foreign(folder)
    edited(bos_token_id=7)
    with pytest.raises(ValueError, match="give the model's own vocabulary"):
        read_foreign(folder)
    edited(intermediate_size=47)
    with pytest.raises(ValueError, match=r"intermediate\.dense\.bias is .*, expected \(47,\)"):
        read_foreign(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_proj.x"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="can not be converted"):
        read_foreign(folder)
