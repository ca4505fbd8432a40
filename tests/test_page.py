import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openblip import page as page_module
from openblip.images import ImageDecodeError
from openblip.page import (
    Badge,
    CardLine,
    Html,
    KeyFigure,
    Section,
    bars,
    card,
    cards,
    details,
    key_figures,
    link,
    no_picture,
    page,
    paragraph,
    picture,
    table,
    tag,
    write_page,
)

NASTY = "<script>alert('1')</script> & \"quotes\""


class Nesting(HTMLParser):
    """Checks that every element is closed where it must be, and collects ids and targets."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.targets = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        self.targets += [values[key] for key in ("href", "src") if key in values]
        if name not in {"meta", "img"}:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def encoded(array, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(html):
    data = re.search(r'src="data:image/\w+;base64,([^"]+)"', html).group(1)
    return Image.open(io.BytesIO(base64.b64decode(data)))


def nasty_page():
    items = [card(no_picture(NASTY), NASTY, [CardLine(NASTY, [NASTY, ""], [Badge(NASTY, "bad")])])]
    parts = [
        paragraph(NASTY, link(NASTY, NASTY)),
        key_figures([KeyFigure(NASTY, NASTY, NASTY)]),
        table(NASTY, [NASTY, NASTY], [[NASTY, NASTY]]),
        bars(NASTY, (NASTY, NASTY), [(NASTY, 1.0, NASTY), ("nothing", 0.0, "0")]),
        cards(NASTY, items),
        cards("empty", []),
        details(NASTY, tag("pre", NASTY)),
    ]
    return page(NASTY, [paragraph("lead")], [Section(NASTY, parts), Section("second", [])])


def test_no_text_becomes_markup():
    html = nasty_page()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 15
    Nesting(html)


def test_html_is_not_escaped_twice_and_what_is_formatted_from_it_is():
    part = tag("b", "x & y")
    assert tag("p", part) == "<p><b>x &amp; y</b></p>"
    assert tag("p", f"{part}").startswith("<p>&lt;b&gt;")
    assert not isinstance(part + part, Html)


def test_attribute_names_and_values():
    assert tag("a", class_="x", aria_label='"') == '<a class="x" aria-label="&quot;"></a>'
    assert tag("line", x1=1.0, x2=2.25, viewBox=3) == '<line x1="1" x2="2.2" viewBox="3"></line>'


def test_a_page_stands_alone_and_its_contents_lead_to_its_sections():
    html = page("t", [], [Section("one", []), Section("two", [])])
    parsed = Nesting(html)
    assert [target for target in parsed.targets if target.startswith("#")] == parsed.targets
    assert {target[1:] for target in parsed.targets} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "default-src &#x27;none&#x27;" in html
    assert "@import" not in html
    assert "url(" not in html
    assert '<html lang="en">' in html


def test_the_same_parts_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_page(tmp_path / name, "t", [], [Section("s", [paragraph("ä")])])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "ä" in (tmp_path / "a").read_text(encoding="utf-8")
    assert nasty_page() == nasty_page()


def test_tables_name_their_rows_and_columns():
    html = table("c", ["k", "v"], [["a", "1"], ["b", "2"]])
    assert html.count('scope="col"') == 2
    assert html.count('scope="row"') == 2
    assert '<td class="number">1</td>' in html
    assert '<td class="text">1</td>' in table("c", ["k", "v"], [["a", "1"]], num_text_columns=2)


def test_the_longest_bar_fills_its_column():
    html = bars("c", ("k", "v"), [("a", 2.0, "2"), ("b", 0.5, "0.5")])
    assert re.findall(r"width:([\d.]+)%", html) == ["100.0", "25.0"]


@pytest.mark.parametrize(("height", "width"), [(400, 200), (161, 20), (3, 2000)])
def test_large_pictures_become_thumbnails(height, width):
    pixels = np.full((height, width, 3), 200, np.uint8)
    html = picture(encoded(pixels, "jpeg"), NASTY)
    image = decoded(html)
    assert image.format == "JPEG"
    assert max(image.size) == 160
    assert 'class="photo"' in html
    assert "<script" not in html


def test_small_pictures_keep_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    html = picture(encoded(pixels), "a picture")
    assert np.array_equal(np.asarray(decoded(html)), pixels)
    assert 'class="pixelated"' in html
    assert 'alt="a picture"' in html


def test_what_a_camera_wrote_does_not_reach_the_page():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    pixels = np.zeros((200, 100, 3), np.uint8)
    data = encoded(pixels, "jpeg", exif=exif)
    assert b"secret place" in data
    assert not decoded(picture(data, "")).getexif()


def test_bytes_that_are_no_picture_are_refused():
    with pytest.raises(ImageDecodeError):
        picture(b"<svg onload=alert(1)>", "")


def test_text_has_enough_contrast_in_light_and_dark():
    style = Path(page_module.__file__).with_name("page.css").read_text(encoding="utf-8")
    blocks = [dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in style.split("@media")]
    light, dark = blocks[0], blocks[1]
    assert light.keys() == dark.keys()
    for colors in (light, dark):
        on_page = ["text", "quiet", "link", *(f"color-{index}" for index in range(6))]
        pairs = [(name, back) for name in on_page for back in ("back", "raised")]
        pairs += [(name, f"{name}-back") for name in ("good", "bad", "neutral")]
        for front, back in pairs:
            assert contrast(colors[front], colors[back]) >= 4.5, (front, back)


def contrast(first, second):
    """WCAG 2.1's contrast ratio."""

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
