"""Every endpoint answers as the engine does, and says what is wrong with a request."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from openblip.generation import Decoding
from tests.serve.conftest import IDENTITY, encoded

TEXTS = ["red circle", "blue square left of green cross"]


def test_models_say_what_they_can(running) -> None:
    said = running.client.get("/v1/models").json()
    verbs = {one["name"]: set(one["verbs"]) for one in said["models"]}
    assert verbs["tiny"] == {"caption", "match", "classify", "embed", "search"}
    assert verbs["deep"] == {"caption", "match", "classify", "embed", "explain"}
    assert verbs["vqa"] == {"ask"}
    assert said["models"][0]["model_id"] == IDENTITY
    assert said["index"] == {"name": "index", "num_images": 8}
    assert said["runs"] == ["first run"]
    assert said["limits"]["max_upload_bytes"] == 300_000


def test_captions(running, engine, picture) -> None:
    said = running.post("caption", picture).json()
    [[expected]] = engine.caption([picture])
    [caption] = said["captions"]
    assert caption["text"] == expected.text
    assert caption["mean_log_probability"] == pytest.approx(expected.mean_log_probability, abs=1e-4)
    assert [word["text"] for word in caption["words"]] == [word.text for word in expected.words]
    several = running.post("caption", picture, num_captions=3, method="nucleus", seed=5).json()
    [expected] = engine.caption(
        [picture], decoding=Decoding("nucleus"), captions_per_image=3, seeds=[5]
    )
    assert [one["text"] for one in several["captions"]] == [one.text for one in expected]


@pytest.mark.parametrize("method", [None, "greedy", "nucleus"])
def test_a_caption_comes_word_by_word(running, picture, method) -> None:
    fields = {"stream": "true", "seed": 3, **({} if method is None else {"method": method})}
    response = running.post("caption", picture, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [
        (block.splitlines()[0].removeprefix("event: "),
         json.loads(block.splitlines()[1].removeprefix("data: ")))
        for block in response.text.strip().split("\n\n")
    ]  # fmt: skip
    assert [name for name, _ in events] == ["word"] * (len(events) - 1) + ["done"]
    whole = running.post("caption", picture, method=method or "greedy", seed=3).json()
    assert events[-1][1] == whole
    assert [word for _, word in events[:-1]] == whole["captions"][0]["words"]


def test_matches(running, engine, picture) -> None:
    said = running.post("match", picture, texts=TEXTS).json()
    [expected] = engine.match([picture], [TEXTS])
    assert [one["text"] for one in said["texts"]] == TEXTS
    for one, judged in zip(said["texts"], expected, strict=True):
        assert one["match_probability"] == pytest.approx(judged.match_probability, abs=1e-4)
        assert one["similarity"] == pytest.approx(judged.similarity, abs=1e-4)


def test_answers(running, vqa_engine, picture) -> None:
    said = running.post("ask", picture, question="what is red?", num_answers=2).json()
    [[expected]] = vqa_engine.ranked_answers([picture], [["what is red?"]], num_answers=2)
    assert [one["text"] for one in said["answers"]] == [one.text for one in expected]
    chosen = running.post("ask", picture, question="what?", answers=["red", "blue", "green"]).json()
    assert {one["text"] for one in chosen["answers"]} == {"red", "blue", "green"}
    assert sum(one["probability"] for one in chosen["answers"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("score", ["itc", "itm", "both"])
def test_labels(running, engine, picture, score) -> None:
    said = running.post("classify", picture, labels=["red", "blue"], score=score).json()
    [expected] = engine.classify([picture], engine.labels(["red", "blue"]), score=score)
    assert [one["label"] for one in said["labels"]] == [one.label for one in expected]
    assert said["labels"][0]["probability"] == pytest.approx(expected[0].probability, abs=1e-4)
    assert (said["labels"][0]["match_probability"] is None) == (score == "itc")


def test_embeddings(running, engine, picture) -> None:
    said = running.post("embed", picture, texts=TEXTS).json()
    assert said["image_embedding"] == pytest.approx(
        engine.embed_images([picture])[0].tolist(), abs=1e-5
    )
    assert said["text_embeddings"][1] == pytest.approx(
        engine.embed_texts(TEXTS)[1].tolist(), abs=1e-5
    )
    assert running.post("embed", texts=TEXTS).json()["image_embedding"] is None


def test_explanations(running, picture) -> None:
    said = running.post("explain", picture, text="Red circle").json()
    assert (said["rows"], said["columns"], said["text"]) == (2, 2, "red circle")
    assert [word["text"] for word in said["words"]] == ["red", "circle"]
    assert max(max(row) for word in said["words"] for row in word["heat"]) in (0.0, 1.0)


def test_search_and_its_pictures(running, pictures) -> None:
    found = running.post("search", pictures[3], limit=3).json()
    [first, *_] = found["hits"]
    assert (first["key"], first["width"]) == ("picture_3", 48)
    assert first["metadata"]["captions"][0]["text"] == "caption 3"
    assert "address" not in first["metadata"]
    thumbnail = running.client.get(f"{first['picture']}?side=32")
    assert thumbnail.headers["content-type"] == "image/jpeg"
    original = running.client.get(f"{first['picture']}/original")
    assert original.content == pictures[3]
    by_text = running.post("search", text="red", where=["caption~caption 1"]).json()
    assert [hit["key"] for hit in by_text["hits"]] == ["picture_1"]
    assert by_text["hits"][0]["match_probability"] is not None
    assert "re-ranked" in by_text["method"]
    both = running.post("search", pictures[0], text="red", rerank="false").json()
    assert both["method"] == "mean of picture and text by ITC"


def test_pictures_of_another_state_of_the_index_are_none(running) -> None:
    [hit] = running.post("search", text="red", limit=1).json()["hits"]
    _, _, _, generation, number = hit["picture"].split("/")
    gone = running.client.get(f"/v1/pictures/{int(generation) + 1}/{number}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "index_changed")
    assert running.client.get(f"/v1/pictures/{generation}/99").status_code == 404


def test_runs_show_their_pages_and_nothing_else(running) -> None:
    said = running.client.get("/v1/runs").json()
    [run] = said["runs"]
    assert [one["title"] for one in run["pages"]] == ["logs/curves.html", "report.html"]
    page = running.client.get(run["pages"][1]["address"])
    assert page.text == "<h1>report</h1>"
    assert page.headers["content-security-policy"].startswith("sandbox;")
    for path in ("secret.txt", "link.html", "../outside.html", "%2e%2e/outside.html", "logs"):
        assert running.client.get(f"/v1/runs/first%20run/{path}").status_code == 404
    assert running.client.get("/v1/runs/other/report.html").status_code == 404


def test_the_page_and_its_files(running) -> None:
    page = running.client.get("/")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<title>" in page.text
    script = running.client.get("/page/main.js")
    assert script.headers["content-type"].startswith("text/javascript")
    for path in ("../app.py", "%2e%2e%2fapp.py", "app.py", ""):
        assert running.client.get(f"/page/{path}").status_code in (404, 405)


@pytest.mark.parametrize(
    ("verb", "fields", "status", "told"),
    [
        ("caption", {}, 422, "the field `image` holds no picture"),
        ("caption", {"method": "best"}, 422, "method:"),
        ("caption", {"num_beams": 99}, 422, "num_beams:"),
        ("caption", {"min_tokens": 30}, 422, "min_tokens 30 and max_tokens 20"),
        ("caption", {"stream": "true", "method": "beam"}, 422, "stream:"),
        ("caption", {"stream": "true", "num_captions": 2, "method": "nucleus"}, 422, "stream:"),
        ("caption", {"num_captions": 9}, 422, "captions_per_image 9: beam gives 1 to 3"),
        ("caption", {"url": "https://example.org/a.jpg"}, 422, "fetches no pictures"),
        ("caption", {"model": "nobody"}, 404, "there are tiny, deep, vqa"),
        ("caption", {"model": "vqa"}, 404, "the model vqa can caption|vqa can"),
        ("match", {}, 422, "texts:"),
        ("match", {"texts": ["a"] * 17}, 422, "texts: 17, expected 1 to 16"),
        ("match", {"texts": "x" * 501}, 413, "longer than 500 characters"),
        ("match", {"texts": " "}, 422, "a text is empty"),
        ("classify", {"labels": ["one"]}, 422, "labels: 1, expected 2 to 16"),
        ("classify", {"labels": ["one", "one"]}, 422, "labels that stand more than once"),
        ("classify", {"labels": ["a", "b"], "templates": ["no place"]}, 422, "templates need one"),
        ("embed", {}, 422, "give an image, texts, or both"),
        ("explain", {"text": "red", "model": "tiny"}, 404, "tiny"),
        ("search", {}, 422, "give a text, an image, or both"),
        ("search", {"text": "red", "where": ["?"]}, 422, "is no condition"),
        ("search", {"text": "red", "where": ["colour=red"]}, 422, "no image has a field"),
    ],
)
def test_what_is_wrong_is_said(running, picture, verb, fields, status, told) -> None:
    needs_none = told.startswith(("the field", "give an image", "give a text")) or "url" in fields
    response = running.post(verb, None if needs_none else picture, **fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert any(part in error["message"] for part in told.split("|")), error
    assert error["request_id"] == response.headers["x-request-id"]


def test_unknown_paths_and_methods_have_the_same_shape(running) -> None:
    for response, status in (
        (running.client.get("/nothing"), 404),
        (running.client.get("/v1/caption"), 405),
        (running.client.post("/v1/caption", content=b"{}"), 422),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_one_bad_request_costs_its_batch_nothing(running, engine, pictures) -> None:
    """Requests of a kind that come together are answered together, each as if it were alone."""

    def ask(number: int) -> object:
        if number % 5 == 4:
            return running.post("match", encoded(4, 4)[:40], texts=["red"]).status_code
        return running.post("match", pictures[number % 8], texts=TEXTS).json()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(40)))
    for number, answer in enumerate(answers):
        if number % 5 == 4:
            assert answer == 422
            continue
        [expected] = engine.match([pictures[number % 8]], [TEXTS])
        got = [one["match_probability"] for one in answer["texts"]]
        assert got == pytest.approx([one.match_probability for one in expected], abs=1e-4)
    figures = running.client.get("/metrics").text
    assert 'openblip_batch_size_count{kind="match",model="tiny"}' in figures


def test_the_openapi_names_all_endpoints_and_errors(running) -> None:
    said = running.client.get("/openapi.json").json()
    work = {path for path, item in said["paths"].items() if "post" in item}
    verbs = ("caption", "match", "ask", "classify", "embed", "explain", "search")
    assert work == {f"/v1/{verb}" for verb in verbs}
    responses = said["paths"]["/v1/caption"]["post"]["responses"]
    assert {"200", "401", "413", "415", "422", "429", "503", "504"} <= set(responses)
    assert "example" in said["components"]["schemas"]["CaptionsAnswer"]


def test_base64_is_no_picture(running, picture) -> None:
    response = running.post("caption", base64.b64encode(picture))
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_format")
