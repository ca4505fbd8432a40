"""Commands for sentences about two images: finetune nlvr, evaluate nlvr."""

import json
from pathlib import Path

from openblip.data.sources import list_shards, read_samples


def test_from_a_model_to_predictions(run, model: Path, world: Path, tmp_path: Path) -> None:
    [shard] = list_shards(world / "human")
    samples = list(read_samples(shard, on_bad=lambda key, reason: None))[:6]
    rows = []
    for number, sample in enumerate(samples):
        name = f"dev-3-{number}"
        for side in (0, 1):
            (tmp_path / f"{name}-img{side}.png").write_bytes(samples[number - side].image_bytes)
        rows.append(
            {"identifier": f"{name}-0", "sentence": sample.captions[0].text,
             "label": str(number % 2 == 0)}
        )  # fmt: skip
    data = tmp_path / "dev.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: [{data}]\ninit: {model}\nnum_steps: 3\nbatch_size: 4\nmax_tokens: 30\n"
        "randaugment_ops: 0\n"
    )
    trained = run("finetune", "nlvr", recipe, "--out", tmp_path / "nlvr", "--json")
    assert trained.code == 0
    assert trained.json["roles"] == ["pair"]
    file = tmp_path / "out" / "predictions.csv"
    result = run("evaluate", "nlvr", tmp_path / "nlvr", data, "--predictions", file, "--json")
    assert result.code == 0
    assert result.json["num_sentences"] == 6
    told = dict(line.split(",") for line in file.read_text().splitlines())
    assert told == {key: str(value) for key, value in result.json["predictions"].items()}
    right = sum(told[row["identifier"]] == row["label"] for row in rows)
    assert result.json["accuracy"] == 100.0 * right / 6
    text = run("evaluate", "nlvr", tmp_path / "nlvr", data).out
    assert f"{result.json['accuracy']:.2f}" in text
    refused = run("evaluate", "nlvr", model, data)
    assert refused.code == 2
    assert "a model for no task, expected nlvr" in refused.err
