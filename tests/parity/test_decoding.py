"""Greedy, beam and nucleus runs of the official code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from openblip.generation import Decoding, generate
from openblip.tokenizer import Tokenizer


def decoding_of(call: dict[str, Any]) -> Decoding:
    """Return what the arguments of the official `generate` mean."""
    if call["sample"]:  # hard-coded there, and the default of its transformers
        method, penalty, top_k = "nucleus", 1.1, 50
    else:
        method = "greedy" if call["num_beams"] == 1 else "beam"
        penalty, top_k = call.get("repetition_penalty", 1.0), 0
    return Decoding(
        method=method,
        num_beams=call.get("num_beams", 1),
        top_p=call.get("top_p", 0.9),
        top_k=top_k,
        repetition_penalty=penalty,
        min_tokens=call["min_length"],
        max_tokens=call["max_length"],
        scoring="transformers-4.15",
    )


def test_greedy_beam_and_nucleus(
    reference: Path, official_blip, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows stay to the end, as in the original, so that every step's can be compared.
    monkeypatch.setattr("openblip.generation_batch.LEAVING_PARTS", 1)
    facts = json.loads((reference / "decoder.json").read_text())
    tensors = load_file(reference / "decoder_io.safetensors")
    blip = official_blip(frozenset({"decode"}))
    tokens = blip.config.tokens
    with torch.no_grad():
        context = blip.project_context(blip.encode_image(tensors["images"]))
    prompt_ids = tensors["prompt.input_ids"][0, 1:].tolist()
    methods = set()
    for index, run in enumerate(facts["generate"]):
        call, decoding = run["call"], decoding_of(run["call"])
        methods.add(decoding.method)
        seen: list[torch.Tensor] = []

        def argmax(probabilities: torch.Tensor, _: object, seen=seen) -> torch.Tensor:
            seen.append(probabilities)
            return probabilities.argmax(dim=1)

        captions = generate(
            blip, context, prompt_ids=prompt_ids, tokens=tokens, decoding=decoding,
            seeds=[0] * context.num_images, sample=argmax,
        )  # fmt: skip
        for [caption], expected in zip(captions, run["output_ids"], strict=True):
            wanted = [i for i in expected if i != tokens.pad]
            got = [tokens.dec, *prompt_ids, *caption.token_ids]
            got += [tokens.sep] if caption.is_finished else []
            assert got == wanted, (index, call)
        assert len(seen) == run.get("steps", 0)
        for step, probabilities in enumerate(seen):
            name = f"sample{index}.step{step}.probs"
            rows = tensors[name].sum(dim=1) > 0
            assert_close(probabilities[rows], tensors[name][rows], atol=1e-5, rtol=1e-4)
            num_left = (probabilities[rows] > 0).sum(dim=1).tolist()
            expected = run["nonzero_per_step"][step]
            assert num_left == [n for n, row in zip(expected, rows, strict=True) if row]
    assert methods == {"greedy", "beam", "nucleus"}


def test_log_probabilities_are_the_models_own(reference: Path, official_blip) -> None:
    tensors = load_file(reference / "decoder_io.safetensors")
    blip = official_blip(frozenset({"decode"}))
    with torch.no_grad():
        context = blip.project_context(blip.encode_image(tensors["images"]))
    tokens = blip.config.tokens
    prompt_ids = tensors["prompt.input_ids"][0, 1:].tolist()
    for method in ("greedy", "beam", "nucleus"):
        decoding = Decoding(method=method, repetition_penalty=1.3, max_tokens=8)
        captions = generate(
            blip, context, prompt_ids=prompt_ids, tokens=tokens, decoding=decoding,
            seeds=range(context.num_images),
        )  # fmt: skip
        for image, [caption] in enumerate(captions):
            end = [tokens.sep] if caption.is_finished else []
            ids = torch.tensor([[tokens.dec, *prompt_ids, *caption.token_ids, *end]])
            with torch.no_grad():
                one = context.select(torch.tensor([image]))
                own = blip.decode(ids, torch.ones_like(ids), one).log_softmax(dim=-1)
            start = len(prompt_ids)
            steps = range(start, ids.shape[1] - 1)
            wanted = [own[0, t, ids[0, t + 1]].item() for t in steps]
            assert caption.log_probabilities == pytest.approx(wanted, abs=1e-4)


def test_beam_scores(reference: Path, official_blip) -> None:
    """Compare scores that are sums of the model's own log-probabilities: no repetition penalty."""
    facts = json.loads((reference / "decoder.json").read_text())
    tensors = load_file(reference / "decoder_io.safetensors")
    blip = official_blip(frozenset({"decode"}))
    with torch.no_grad():
        context = blip.project_context(blip.encode_image(tensors["images"]))
    prompt_ids = tensors["prompt.input_ids"][0, 1:].tolist()
    runs = [
        run
        for run in facts["generate"]
        if "beam_sequence_scores" in run and run["call"].get("repetition_penalty", 1.0) == 1.0
    ]
    assert runs
    for run in runs:
        captions = generate(
            blip, context, prompt_ids=prompt_ids, tokens=blip.config.tokens,
            decoding=decoding_of(run["call"]), seeds=[0] * context.num_images,
        )  # fmt: skip
        scores = [
            sum(caption.log_probabilities) / (1 + len(prompt_ids) + len(caption.token_ids))
            for [caption] in captions
        ]
        assert scores == pytest.approx(run["beam_sequence_scores"], abs=1e-5), run["call"]


def test_texts_of_the_written_ids(reference: Path) -> None:
    facts = json.loads((reference / "decoder.json").read_text())
    words = (reference / "vocab.txt").read_text().splitlines()
    tokenizer = Tokenizer.from_vocabulary(words)
    num_prompt = len(tokenizer.encode(facts["prompt"])) - 1
    num_compared = 0
    for run in facts["generate"]:
        for ids, expected in zip(run["output_ids"], run["captions"], strict=True):
            whole = tokenizer.decode(ids)
            assert whole[len(facts["prompt"]) :] == expected
            # A first word piece (##p) is joined to the prompt there, and then cut into.
            if whole.startswith(facts["prompt"]):
                assert tokenizer.decode(ids[num_prompt:]) == expected
                num_compared += 1
    assert num_compared
