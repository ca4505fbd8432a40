"""Search: the shortlist, ITM's order, conditions, and images that are gone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from openblip.inference import Engine, tokenize
from openblip.search.index import Index
from openblip.search.query import Query, Searcher
from openblip.search.where import matching

TEXT = "red circle left of blue square"


@pytest.fixture
def index(source, add, tmp_path: Path) -> Index:
    add(source("folder"), tmp_path / "index", commit_images=5)
    return Index.open(tmp_path / "index")


def test_without_itm_the_order_is_that_of_the_cosines(index, engine) -> None:
    results = Searcher(engine, index).search(Query(TEXT, limit=5, is_reranked=False))
    text = engine.embed_texts([TEXT])[0]
    expected = (torch.cat([v for _, v in index.blocks()]) @ text).sort(descending=True)
    assert [hit.number for hit in results.hits] == expected.indices[:5].tolist()
    scores = [hit.score for hit in results.hits]
    assert scores == pytest.approx(expected.values[:5].tolist(), abs=1e-5)
    assert results.num_searched == 12
    assert all(hit.match_probability is None for hit in results.hits)


@pytest.mark.parametrize("has_states", [False, True])
def test_itm_orders_the_shortlist_as_in_retrieval(
    has_states, source, add, engine: Engine, pictures, tmp_path
) -> None:
    add(source("tar"), tmp_path / "index", has_states=has_states)
    index = Index.open(tmp_path / "index")
    results = Searcher(engine, index).search(Query(TEXT, limit=12, shortlist=6))
    text = engine.embed_texts([TEXT])[0]
    cosines = {index.key(n): float(index.embeddings([n])[0] @ text) for n in range(12)}
    nearest = sorted(cosines, key=lambda key: -cosines[key])
    tokens = tokenize(engine.tokenizer, [TEXT])
    logits = {
        key: float(engine.match_tokens(engine.encode([pictures[key]]), tokens)) for key in nearest
    }
    judged = sorted(nearest[:6], key=lambda key: -(logits[key] + cosines[key]))
    assert [hit.key for hit in results.hits] == [*judged, *nearest[6:]]
    for hit in results.hits[:6]:
        assert hit.score == pytest.approx(logits[hit.key] + cosines[hit.key], abs=2e-2)
        assert 0 < (hit.match_probability or 0) < 1
    assert all(hit.match_probability is None for hit in results.hits[6:])


def test_a_picture_finds_itself(index, engine, pictures) -> None:
    results = Searcher(engine, index).search(Query(image=pictures["picture_05"], limit=1))
    assert results.hits[0].key == "picture_05"
    assert results.hits[0].similarity == pytest.approx(1, abs=1e-5)
    assert results.method == "picture by ITC"


def test_a_picture_with_a_text_is_the_mean_where_nothing_refines(index, engine, pictures) -> None:
    query = Query(TEXT, pictures["picture_05"])
    embedding, method = Searcher(engine, index).embed(query)
    both = engine.embed_images([query.image]) + engine.embed_texts([TEXT])
    torch.testing.assert_close(embedding, F.normalize(both, dim=1)[0])
    assert method == "mean of picture and text by ITC"


def test_an_image_that_is_gone_stands_behind_and_is_told(source, add, engine, tmp_path) -> None:
    folder = source("folder")
    add(folder, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    (folder / "picture_05.jpg").unlink()
    (folder / "picture_06.jpg").write_bytes(b"something else")
    results = Searcher(engine, index).search(Query(TEXT, limit=12))
    assert set(results.unreadable) == {"picture_05", "picture_06"}
    assert {hit.key for hit in results.hits[-2:]} == {"picture_05", "picture_06"}


def test_another_model_is_refused(index, engine) -> None:
    with pytest.raises(ValueError, match="a model 0123 embeds elsewhere"):
        Searcher(engine, index, model_id="0123")


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["number>=10"], {10, 11}),
        (["number=3"], {3}),
        (["number!=3", "number<5"], {0, 1, 2, 4}),
        (["caption~PICTURE_1"], {10, 11}),
        (["width>=48", "height<=48"], set(range(12))),
        (["width>48"], set()),
        (["key=picture_07"], {7}),
        (["key~_0", "number>7"], {8, 9}),
    ],
)
def test_conditions(index, conditions, expected) -> None:
    found = np.flatnonzero(matching(index, conditions)).tolist()
    assert {index.metadata(number)["number"] for number in found} == expected


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("nonsense", "is no condition"),
        ("=3", "is no condition"),
        ("colour=red", "no image has a field 'colour'; there are key, .*number"),
        ("width=wide", "'wide' is no number"),
    ],
)
def test_a_bad_condition_is_told(index, condition, told) -> None:
    with pytest.raises(ValueError, match=told):
        matching(index, [condition])


def test_conditions_hold_for_searches(index, engine) -> None:
    results = Searcher(engine, index).search(Query(TEXT, where=("number<4",)))
    assert {hit.metadata["number"] for hit in results.hits} == {0, 1, 2, 3}
    assert results.num_searched == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [({}, "nothing to search"), ({"text": " "}, "empty"), ({"text": "a", "limit": 0}, "limit 0")],
)
def test_a_query_of_nothing_is_refused(options, told) -> None:
    with pytest.raises(ValueError, match=told):
        Query(**options)
