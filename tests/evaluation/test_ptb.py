"""What the Java tokenizer of coco-caption was seen to answer, and words without punctuation."""

import gzip
import json
from pathlib import Path

import pytest

from openblip.evaluation.ptb import caption_words, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A Man rides a horse.", "a man rides a horse ."),
        ("don't can't won't ain't DON'T cannot", "do n't ca n't wo n't ai n't do n't can not"),
        ("it's I'm he'd they're we've you'll", "it 's i 'm he 'd they 're we 've you 'll"),
        ("don’t it’s “double” dogs’", "do n't it 's `` double '' dogs '"),
        ("the dogs' ball, Harry's hat", "the dogs ' ball , harry 's hat"),
        ('a sign "STOP" and "go!"', "a sign `` stop '' and `` go ! ''"),
        ("a 'quoted' word", "a ` quoted ' word"),
        ("gonna gotta 'tis rock 'n' roll", "gon na got ta 't is rock 'n' roll"),
        ("O'Brien o'clock ma'am De'Andre Hawai'i", "o'brien o'clock ma'am de'andre hawai'i"),
        ("t-shirt black-and-white man-made-", "t-shirt black-and-white man-made -"),
        ("and/or 24/7 TV/DVD a/b/c/d", "and/or 24/7 tv/dvd a/b/c / d"),
        ("10,400 1.5 .5 -5 10:30pm 1990's '90s", "10,400 1.5 .5 -5 10:30 pm 1990 's '90s"),
        ("3.5mm 3.5-inch 4GB 5x7 2nd 100%", "3.5 mm 3.5-inch 4gb 5x7 2nd 100 %"),
        ("$30 £10 €20 10¢ #1 US$40", "$ 30 # 10 $ 20 10 cents # 1 us$ 40"),
        ('5\'6" 10.5"', "5 ' 6 '' 10.5 ''"),
        ("a - b -- c — d – e… so...", "a - b -- c -- d -- e ... so ..."),
        ("(a) [b] {c}", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("Mr. Smith met Dr. Who vs. him", "mr. smith met dr. who vs. him"),
        ("no. 5 and no. five", "no. 5 and no . five"),
        ("in the U.S. with J.R.R. Tolkien", "in the u.s. with j.r.r. tolkien"),
        ("John F. Kennedy", "john f. kennedy"),
        ("plan B. The end", "plan b . the end"),
        ("hi! hi!! wow?! Yahoo!", "hi ! hi !! wow ?! yahoo !"),
        ("a,b a;b a:b a&b AT&T AT&amp;T", "a , b a ; b a : b a & b at&t at&t"),
        (
            "foo.jpg 1.png www.example.com http://x.y/z.",
            "foo.jpg 1.png www.example.com http://x.y/z .",
        ),
        ("a@b.com #tag @user :) :-(", "a@b.com #tag @user :-rrb- :--lrb-"),
        ("<UNK> 3 < 5", "<unk> 3 < 5"),
        ("café русский हिन्दी 日本語 ® ° ★", "café русский हिन्दी 日本語 ® ° ★"),
        ("dropped 😀 【x】", "dropped x"),
    ],
)
def test_tokens_equal_those_of_the_java_program(text: str, tokens: str) -> None:
    assert tokenize(text) == tokens.split(" ")


def test_a_token_of_several_parts_is_joined_by_no_break_spaces() -> None:
    assert tokenize("1 1/2 cups") == ["1\u00a01/2", "cups"]
    assert tokenize("1½ cups") == ["1\u00a01/2", "cups"]
    assert tokenize("(212) 555-1234") == ["-lrb-212-rrb-\u00a0555-1234"]


def test_caption_words_leave_out_punctuation_but_not_brackets() -> None:
    words = "a big dog it 's -lrb- very -rrb- fast look"
    assert " ".join(caption_words('A "big" dog; it\'s (very) fast -- look!')) == words
    assert caption_words(" . ") == []
    assert caption_words("") == []


def test_a_full_stop_at_the_end_of_a_caption_makes_no_other_word() -> None:
    assert caption_words("this is plan B.") == caption_words("this is plan B")


def test_all_shared_captions_give_the_words_of_the_java_program(shared: Path) -> None:
    folder = shared / "data" / "coco-eval"
    for results in sorted(folder.glob("*_results.json")):
        name = results.name.removesuffix("_results.json")
        with gzip.open(folder / f"{name}_per_image.json.gz", "rt", encoding="utf-8") as file:
            expected = json.load(file)
        for row in json.loads(results.read_text(encoding="utf-8")):
            words = " ".join(caption_words(row["caption"]))
            assert [words] == expected["tokenized_hyps"][str(row["image_id"])]
        references: dict[str, list[str]] = {image: [] for image in expected["tokenized_refs"]}
        annotations = json.loads((folder / f"{name}_refs.json").read_text(encoding="utf-8"))
        for row in annotations["annotations"]:
            if str(row["image_id"]) in references:
                references[str(row["image_id"])].append(" ".join(caption_words(row["caption"])))
        assert references == expected["tokenized_refs"]
