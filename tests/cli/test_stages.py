"""Commands that train, bootstrap and filter, on a few steps of tiny models."""

import json
from pathlib import Path

import pytest

import openblip.quickstart
from openblip.capfilt.bootstrap import BootstrapRecipe
from openblip.capfilt.run import EngineChoice
from openblip.checkpoint import load_checkpoint
from openblip.config import load_recipe
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import WorldConfig
from openblip.data.world_edits import EditsConfig
from openblip.data.world_questions import QUESTIONS_PER_IMAGE, QuestionsConfig

MODEL = (
    "{image_size_px: 32, patch_size_px: 16, vision_width: 16, vision_layers: 1, vision_heads: 2, "
    "text_width: 16, text_layers: 1, text_heads: 2, ffn_width: 32, max_positions: 40, "
    "embedding_width: 8, dropout: 0.0}"
)
TRAINING = "num_steps: 2, batch_size: 4, randaugment_ops: 0, max_tokens: 20"
LOOP = f"""
vocab_size: 120
pretrain: {{model: {MODEL}, objective: {{alignment: {{queue_size: 8}}}}, {TRAINING}}}
captioner: {{{TRAINING}, prompt: ""}}
filter: {{{TRAINING}, alignment: {{queue_size: 8}}}}
capfilt: {{prompts: [""], decoding: {{max_tokens: 8}}}}
evaluation: {{shortlist: 4, decoding: {{num_beams: 1, max_tokens: 8}}}}
"""


@pytest.fixture
def recipe(tmp_path: Path):
    """Return a function that writes a recipe file."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def pretraining(world: Path) -> str:
    return (
        f"data: [{world / 'web'}, {world / 'human'}]\nvocab_size: 120\nmodel: {MODEL}\n"
        "num_steps: 2\nbatch_size: 4\nmax_tokens: 20\nrandaugment_ops: 0\n"
        "objective: {alignment: {queue_size: 8}}\n"
    )


def finetuning(world: Path, model: Path) -> str:
    return (
        f"data: [{world / 'human'}]\ninit: {model}\nnum_steps: 2\nbatch_size: 4\nmax_tokens: 20\n"
        "randaugment_ops: 0\n"
    )


def test_pretrain_leaves_a_checkpoint_and_its_log(run, recipe, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "base"
    path = recipe(pretraining(world))
    result = run("pretrain", path, "--out", out, "--set", "num_steps=3", "--json")
    assert result.code == 0, result.err
    blip, tokenizer = load_checkpoint(out)
    assert blip.config.text.vocab_size == tokenizer.vocab_size <= 120
    log = [json.loads(line) for line in Path(result.json["log"]).read_text().splitlines()]
    assert log[-1]["step"] == 2
    assert result.json["last_step"] == log[-1]
    assert result.json["num_parameters"] == sum(p.numel() for p in blip.parameters())
    card = (out / "README.md").read_text()
    assert "num_steps: 3" in card
    assert result.json["model_id"] in card
    refused = run("pretrain", path, "--out", out)
    assert refused.code == 2
    assert f"{out} exists" in refused.err


def test_a_vocabulary_can_be_taken_over(run, recipe, world: Path, model: Path, tmp_path) -> None:
    result = run(
        "pretrain", recipe(pretraining(world)), "--out", tmp_path / "m", "--set",
        f"vocabulary={model}",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "model id" in result.out
    words = (tmp_path / "m" / "tokenizer.json").read_text()
    assert json.loads(words) == json.loads((model / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    ("task", "roles"), [("captioning", {"decode"}), ("retrieval", {"text", "pair"})]
)
def test_finetune_leaves_a_model_of_the_task(
    run, recipe, world: Path, model: Path, tmp_path: Path, task: str, roles: set[str]
) -> None:
    path = recipe(finetuning(world, model))
    sets = ["--set", "image_size_px=48"]
    if task == "retrieval":
        sets += ["--set", "alignment.queue_size=8", "--set", f"negatives=[{world / 'web'}]"]
    result = run("finetune", task, path, "--out", tmp_path / "m", *sets, "--json")
    assert result.code == 0, result.err
    blip, _ = load_checkpoint(tmp_path / "m")
    assert blip.config.text.roles == roles
    assert blip.config.vision.image_size_px == 48
    notes = "\n".join(result.json["notes"])
    assert "tensors left out" in notes
    assert "tensors resized (1): vision.position_embedding" in notes
    assert "image_size_px: 48" in (tmp_path / "m" / "README.md").read_text()
    assert (tmp_path / "m.log.jsonl").is_file()


def test_the_best_model_stands_beside_the_last(
    run, recipe, world: Path, model: Path, tmp_path: Path
) -> None:
    text = finetuning(world, model) + f"evaluation: {{every_steps: 1, data: [{world / 'human'}]}}\n"
    result = run("finetune", "captioning", recipe(text), "--out", tmp_path / "m", "--json")
    assert result.code == 0, result.err
    best = result.json["best"]
    assert best["folder"] == str(tmp_path / "m.best")
    load_checkpoint(best["folder"])
    assert best["criterion"] == pytest.approx(best["cider"] + best["bleu_4"])
    assert result.json["last_evaluation"]["step"] == 1
    assert "'cider':" in (tmp_path / "m" / "README.md").read_text()
    lost = run("finetune", "captioning", recipe(text.replace("human", "nowhere")), "--out", "n")
    assert lost.code == 2


@pytest.mark.parametrize("command", ["pretrain", "finetune captioning", "finetune retrieval"])
def test_a_dry_run_tells_the_cost_and_writes_nothing(
    run, recipe, world: Path, model: Path, tmp_path: Path, command: str
) -> None:
    text = pretraining(world) if command == "pretrain" else finetuning(world, model)
    out = tmp_path / "new" / "m"
    result = run(*command.split(), recipe(text), "--out", out, "--dry-run", "--json",
                 "--set", "accumulation_steps=2", "--set", "num_steps=100")  # fmt: skip
    assert result.code == 0, result.err
    assert not out.parent.exists()
    cost = result.json
    assert cost["num_parameters"] >= cost["num_trained"] > 0
    assert cost["state_bytes"] >= 16 * cost["num_trained"]
    assert cost["flops_per_step"] > 0
    samples = [s for f in (("web", "human") if command == "pretrain" else ("human",))
               for shard in list_shards(world / f)
               for s in read_samples(shard, on_bad=print)]  # fmt: skip
    assert cost["pairs_per_epoch"] == sum(len(s.captions) for s in samples)
    assert not cost["is_estimate"]
    assert cost["steps_per_epoch"] == cost["pairs_per_epoch"] / 8
    assert cost["seconds"] == pytest.approx(100 * cost["seconds_per_step"])
    shown = run(*command.split(), recipe(text), "--out", out, "--dry-run")
    assert f"{cost['pairs_per_epoch']:,} pairs" in shown.out


@pytest.mark.parametrize(
    ("command", "setting", "message"),
    [
        ("pretrain", "stepz=3", "unknown key stepz (value 3)"),
        ("pretrain", "num_steps=many", "num_steps is 'many'"),
        ("pretrain", "num_steps", "'num_steps' is not a setting; write key=value"),
        ("pretrain", "data=[]", "data is []"),
        ("pretrain", "data=[/absent/data]", "/absent/data is no data set"),
        ("pretrain", "vocabulary=/absent/vocab.txt", "no vocabulary at /absent/vocab.txt"),
        ("pretrain", "model.vision_heads=3", "is not a multiple of num_heads 3"),
        ("finetune captioning", "init=/absent/model", "/absent/model"),
        ("finetune captioning", "image_size_px=33", "33 is not a multiple"),
        ("finetune retrieval", "prompt=x", "unknown key prompt"),
        ("finetune retrieval", "negatives=[/absent/web]", "/absent/web is no data set"),
    ],
)
def test_a_wrong_setting_is_told_in_a_sentence(
    run, recipe, world, model, tmp_path, command: str, setting: str, message: str
) -> None:
    text = pretraining(world) if command == "pretrain" else finetuning(world, model)
    result = run(*command.split(), recipe(text), "--out", tmp_path / "m", "--set", setting)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_a_recipe_that_is_not_there(run, tmp_path: Path) -> None:
    result = run("pretrain", tmp_path / "absent.yaml", "--out", tmp_path / "m")
    assert result.code == 2
    assert result.err == (
        f"openblip: error: recipe {tmp_path / 'absent.yaml'} cannot be read: "
        "No such file or directory\n"
    )


CAPFILT = ("--set", 'prompts=[""]', "--set", "decoding.max_tokens=8")


def test_capfilt_from_run_to_report(run, world: Path, model: Path, tmp_path: Path) -> None:
    models = ("--captioner", model, "--filter", model)
    out = tmp_path / "clean"
    result = run("capfilt", "run", world / "web", out, *models, *CAPFILT, "--json")
    assert result.code == 0, result.err
    assert result.json["num_images"] == 24
    assert result.json["captions"]["web"]["judged"] == 24
    assert (out / "00000.tar").is_file()
    assert (out / "report.html").is_file()

    refused = run("capfilt", "run", world / "web", out, *models, *CAPFILT, "--set", "seed=1")
    assert refused.code == 2
    assert "setting seed was 42 and is 1" in refused.err
    forced = run(
        "capfilt", "run", world / "web", out, *models, *CAPFILT, "--set", "seed=1", "--force"
    )
    assert forced.code == 0, forced.err
    assert json.loads((out / "00000.json").read_text())["settings"]["seed"] == 1
    assert "24 images kept, of 1 shards" in forced.out

    report = run("capfilt", "report", out, "--json")
    assert report.json == json.loads((out / "report.json").read_text())

    all_web = run(
        "capfilt", "rethreshold", out, tmp_path / "web", "--threshold", 0, "--sources", "web",
        "--json",
    )  # fmt: skip
    assert all_web.code == 0, all_web.err
    assert all_web.json["num_images_kept"] == 24
    assert all_web.json["captions"]["web"]["kept"] == 24
    assert all_web.json["captions"]["synthetic"]["kept"] == 0


def test_capfilt_gives_the_same_bytes_on_every_engine(
    run, world: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--captioner", model, "--filter", model, *CAPFILT, "--set", "output=parquet")
    given = (*given, "--set", "unit_bytes=8000")
    names = {}
    for engine in ("local", "pool"):
        out = tmp_path / engine
        options = ("--engine", engine, "--workers", 2, "--threads", 1, "--json")
        result = run("capfilt", "run", world / "web", out, *given, *options)
        assert result.code == 0, result.err
        assert result.json["num_units"] == result.json["num_shards"] > 2
        names[engine] = sorted(path.name for path in out.iterdir())
    planned = run("capfilt", "plan", world / "web", tmp_path / "slurm", *given, "--tasks", 2)
    assert planned.code == 0, planned.err
    script = (tmp_path / "slurm" / "capfilt.sbatch").read_text()
    assert "--engine slurm --tasks 2" in script
    for task in (1, 0):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        options = ("--engine", "slurm", "--tasks", 2, "--threads", 1)
        result = run("capfilt", "run", world / "web", tmp_path / "slurm", *given, *options)
        assert result.code == 0, result.err
        assert "units of this task, 0 not done" in result.out
    assert run("capfilt", "report", tmp_path / "slurm").code == 0
    assert names["local"] == names["pool"]
    for name in names["local"]:
        if name.endswith((".parquet", ".jsonl")):
            first = (tmp_path / "local" / name).read_bytes()
            assert first == (tmp_path / "pool" / name).read_bytes()
            assert first == (tmp_path / "slurm" / name).read_bytes()


def test_capfilt_names_shards_that_cannot_be_read_and_retries_what_failed(
    run, world: Path, model: Path, tmp_path: Path
) -> None:
    models = ("--captioner", model, "--filter", model)
    [shard] = list_shards(world / "web")
    [first, second, *_] = read_samples(shard, on_bad=lambda key, reason: None)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(first.image_bytes)
    (photos / "b.jpg").write_bytes(b"no image")
    done = run("capfilt", "run", photos, tmp_path / "out", *models, *CAPFILT, "--json")
    assert done.json["bad"] == {"not_an_image": 1}
    (photos / "b.jpg").write_bytes(second.image_bytes)
    retried = run("capfilt", "retry", tmp_path / "out", *models, "--json")
    assert retried.code == 0, retried.err
    assert (retried.json["num_retried"], retried.json["bad"]) == (1, {})
    assert retried.json["num_images"] == 2

    (tmp_path / "x.jsonl").write_text('{"key": "x", "image": "photos/a.jpg"}\n')
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no parquet PAR1")
    both = f"{tmp_path}/{{x.jsonl,y.parquet}}"
    lost = run("capfilt", "run", both, tmp_path / "o", *models, *CAPFILT, "--json")
    assert lost.code == 1
    assert "not done: y: cannot read shard" in lost.err
    assert list(lost.json["failed_units"]) == ["y"]
    assert lost.json["num_images"] == 1
    alone = run("capfilt", "run", tmp_path / "y.parquet", tmp_path / "p", *models, "--json")
    assert (alone.code, list(alone.json["failed_units"])) == (1, ["y"])


def test_capfilt_never_writes_over_its_input(run, world: Path, model: Path, tmp_path: Path) -> None:
    models = ("--captioner", model, "--filter", model)
    before = (world / "web" / "00000.tar").read_bytes()
    for source in (world / "web", world / "web" / "00000.tar"):
        result = run("capfilt", "run", source, world / "web", *models)
        assert result.code == 2
        assert "holds the input" in result.err
    assert (world / "web" / "00000.tar").read_bytes() == before
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"no image")
    assert "holds the input" in run("capfilt", "run", photos, photos / "out", *models).err
    assert "holds the input" in run(
        "capfilt", "rethreshold", photos, photos, "--threshold", 0.5
    ).err  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "{folder}"), "holds no shard"),
        (("rethreshold", "{folder}", "{folder}/new", "--threshold", "0.5"), "holds no shard"),
        (("rethreshold", "{folder}", "{folder}/new", "--threshold", "2"), "threshold is 2.0"),
        (
            ("rethreshold", "{folder}", "{folder}/n", "--threshold", "0", "--sources", "wob"),
            "'wob'",
        ),
        (("run", "{folder}/absent", "{folder}/new", "--captioner", "a", "--filter", "b"), "absent"),
    ],
)
def test_capfilt_says_what_is_wrong(run, tmp_path: Path, arguments, message: str) -> None:
    result = run("capfilt", *(a.replace("{folder}", str(tmp_path)) for a in arguments))
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


def test_bootstrap_runs_the_loop(run, recipe, world: Path, tmp_path: Path) -> None:
    data = ("--web", world / "web", "--human", world / "human", "--test", world / "test")
    path, out = recipe(LOOP), tmp_path / "loop"
    result = run("bootstrap", path, *data, "--out", out, "--json")
    assert result.code == 0, result.err
    assert result.json == json.loads((out / "results.json").read_text())
    assert result.json["before"].keys() == result.json["after"].keys()
    assert (out / "report.html").is_file()
    again = run("bootstrap", path, *data, "--out", out)
    assert again.code == 0, again.err
    assert "before" in again.out.splitlines()[0]
    assert f"{result.json['after']['cider']:.3f}" in again.out
    assert again.out.endswith(f"open {out / 'report.html'}\n")
    other = run("bootstrap", path, *data, "--out", out, "--set", "vocab_size=100")
    assert other.code == 2
    assert "holds a loop of another recipe" in other.err
    absent = run("bootstrap", path, *data[:5], tmp_path / "absent", "--out", tmp_path / "new")
    assert absent.code == 2
    assert not (tmp_path / "new").exists()


def test_bootstrap_hands_on_the_engine(
    run, recipe, world: Path, tmp_path: Path, monkeypatch
) -> None:
    asked = {}

    def loop(recipe, data, out, **options):
        asked.update(options, rounds=recipe.rounds)
        return {"before": {"cider": 0.1}, "after": {"cider": 0.3}, "filter": {}, "seconds": 0.0,
                "rounds": [{"cider": 0.2}, {"cider": 0.3}]}  # fmt: skip

    monkeypatch.setattr("openblip.capfilt.bootstrap.bootstrap", loop)
    data = ("--web", world / "web", "--human", world / "human", "--test", world / "test")
    arguments = ("bootstrap", recipe(LOOP), *data, "--out", tmp_path / "loop")
    result = run(*arguments, "--engine", "pool", "--workers", 2, "--set", "rounds=2")
    assert result.code == 0, result.err
    assert asked == {"has_ablation": False, "engine": EngineChoice("pool", 2), "rounds": 2}
    assert result.out.splitlines()[0].split() == ["before", "round", "1", "round", "2"]
    assert result.out.splitlines()[1].split() == ["cider", "0.100", "0.200", "0.300"]
    run(*arguments)
    assert asked["engine"] == EngineChoice()
    assert run(*arguments, "--engine", "slurm").code == 2


def test_quickstart_draws_its_own_world(run, recipe, tmp_path: Path, monkeypatch) -> None:
    world = WorldConfig(num_web=24, num_human=16, num_test=8)
    loop = load_recipe(BootstrapRecipe, recipe(LOOP))
    monkeypatch.setattr(openblip.quickstart, "WORLD", world)
    monkeypatch.setattr(openblip.quickstart, "quickstart_recipe", lambda seed: loop)
    monkeypatch.setattr(openblip.quickstart, "QUESTIONS", QuestionsConfig(num_train=8))
    monkeypatch.setattr(openblip.quickstart, "EDITS", EditsConfig(num_train=8, num_families=1))
    short = {"num_steps": 2, "batch_size": 4}
    for name in ("head_recipe", "vqa_recipe"):
        of = getattr(openblip.quickstart, name)
        monkeypatch.setattr(
            openblip.quickstart, name,
            lambda *given, of=of: of(*given).model_copy(update=short),
        )  # fmt: skip
    result = run("quickstart", "--out", tmp_path / "q", "--seed", 3, "--ablation", "--json")
    assert result.code == 0, result.err
    assert set(result.json["ablation"]) == {
        "base", "filter_only", "captioner_only", "bootstrapped",
    }  # fmt: skip
    shown = run("quickstart", "--out", tmp_path / "q", "--seed", 3, "--ablation").out
    assert "captioner_only" in shown.splitlines()[0]
    assert "ROC-AUC" in shown
    assert result.json["vqa"]["num_questions"] == 8 * QUESTIONS_PER_IMAGE
    [index] = [line.split() for line in shown.splitlines() if "openblip index" in line]
    assert index[2:] == [
        *map(str, (tmp_path / "q/world/test", tmp_path / "q/index")), "--model",
        str(tmp_path / "q/model"),
    ]  # fmt: skip
    [serve] = [line.split() for line in shown.splitlines() if "openblip serve" in line]
    for name in serve[3:6:2]:
        assert (Path(name) / "model.safetensors").is_file()
