"""HTML pages that stand alone: one file, no script, nothing fetched, in light and in dark.

A page is built from parts of type `Html`. Any other text is escaped on its way in, so a caption
from the web stays text. Pictures are encoded anew: neither foreign bytes nor what a camera wrote
beside them reaches the page. The same parts give the same bytes.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from openblip.data.sinks import write_bytes_atomically
from openblip.images import decode_image

THUMBNAIL_PX = 160
_PIXELATED_PX = 64
"""Pictures up to this side are shown enlarged, with their pixels visible."""

_STYLE = Path(__file__).with_name("page.css")
_VOID = frozenset({"img", "meta"})


class Html(str):
    """Text that is HTML already. What is joined or formatted from it is plain text again."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of a page under its own heading, which the page's contents name."""

    title: str
    parts: Sequence[Html]


@dataclass(frozen=True)
class KeyFigure:
    """A number that sums something up; `note` says what it is to be compared with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Badge:
    """A short word about a text; the tone is repeated as a sign, for who sees no colour."""

    text: str
    tone: Literal["good", "bad", "neutral"] = "neutral"


@dataclass(frozen=True)
class CardLine:
    """What one writer says of a picture, and what is known of it; each text is a line."""

    writer: str
    texts: Sequence[str]
    badges: Sequence[Badge] = ()


def write_page(path: Path, title: str, lead: Sequence[Html], sections: Sequence[Section]) -> None:
    """Write a page: its title, what stands before the contents, and its sections."""
    write_bytes_atomically(path, page(title, lead, sections).encode())


def page(title: str, lead: Sequence[Html], sections: Sequence[Section]) -> Html:
    """Return a whole page."""
    names = [f"section-{number}" for number in range(1, len(sections) + 1)]
    contents = [
        tag("li", tag("a", one.title, href=f"#{name}"))
        for name, one in zip(names, sections, strict=True)
    ]
    body = [
        tag("section", tag("h2", one.title, id=f"{name}-title"), *one.parts,
            id=name, aria_labelledby=f"{name}-title")
        for name, one in zip(names, sections, strict=True)
    ]  # fmt: skip
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    header = tag("header", tag("h1", title), *lead)
    navigation = tag("nav", tag("ul", *contents), aria_label="Contents")
    main = tag("body", tag("main", header, navigation, *body))
    return Html("<!DOCTYPE html>\n" + tag("html", head, main, lang="en") + "\n")


def tag(element: str, *content: str, **attributes: object) -> Html:
    """Return an element; `class_` means class, and other underscores in names mean hyphens."""
    names = (name.rstrip("_").replace("_", "-") for name in attributes)
    shown = "".join(
        f' {name}="{html.escape(_value(value))}"'
        for name, value in zip(names, attributes.values(), strict=True)
    )
    if element in _VOID:
        return Html(f"<{element}{shown}>")
    inner = "".join(c if isinstance(c, Html) else html.escape(c) for c in content)
    return Html(f"<{element}{shown}>{inner}</{element}>")


def paragraph(*content: str) -> Html:
    return tag("p", *content)


def note(*content: str) -> Html:
    """Return a paragraph that stands back: how to read what is above it."""
    return tag("p", *content, class_="note")


def link(text: str, target: str) -> Html:
    return tag("a", text, href=target)


def details(summary: str, *content: str) -> Html:
    """Return content that shows when its summary is opened."""
    return tag("details", tag("summary", summary), *content)


def grid(*content: Html) -> Html:
    """Lay parts side by side where there is room."""
    return tag("div", *content, class_="grid")


def key_figures(figures: Sequence[KeyFigure]) -> Html:
    cells = [
        tag("div", tag("dt", one.label), tag("dd", tag("strong", one.value), " ", one.note))
        for one in figures
    ]
    return tag("dl", *cells, class_="figures")


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int = 1
) -> Html:
    """Return a table whose first column names the rows.

    num_text_columns  aligned as text; the columns behind them are numbers
    """

    def column(index: int) -> str:
        return "text" if index < num_text_columns else "number"

    head = [tag("th", name, scope="col", class_=column(i)) for i, name in enumerate(header)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_="text"),
            *(tag("td", cell, class_=column(i)) for i, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    content = (tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    # Who uses a keyboard must be able to reach what scrolls.
    return tag("div", tag("table", *content), class_="scroll", role="region",
               tabindex="0", aria_label=caption)  # fmt: skip


def bars(caption: str, header: tuple[str, str], rows: Sequence[tuple[str, float, str]]) -> Html:
    """Return a bar per row (name, length, text of the value); the longest one fills its column."""
    longest = max((length for _, length, _ in rows), default=0.0) or 1.0
    body = [
        tag("tr", tag("th", name, scope="row", class_="text"), tag("td", value, class_="number"),
            tag("td", tag("div", class_="bar", style=f"width:{100 * length / longest:.1f}%"),
                class_="track", aria_hidden="true"))
        for name, length, value in rows
    ]  # fmt: skip
    head = [
        tag("th", header[0], scope="col", class_="text"),
        tag("th", header[1], scope="col", class_="number"),
        tag("td", aria_hidden="true"),
    ]
    content = (tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("table", *content, class_="bars")


def picture(data: bytes, description: str) -> Html:
    """Return an encoded image as a thumbnail. Raises ImageDecodeError if it is none."""
    image = decode_image(data)
    side = max(image.size)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Without loss if it came small, as the pixels may be looked at.
    kind = "jpeg" if side > THUMBNAIL_PX else "png"
    image.save(buffer, kind, **({"quality": 82} if kind == "jpeg" else {"optimize": True}))
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return tag(
        "img",
        src=f"data:image/{kind};base64,{encoded}",
        alt=description,
        width=image.width,
        height=image.height,
        class_="pixelated" if side <= _PIXELATED_PX else "photo",
    )


def no_picture(reason: str) -> Html:
    return tag("div", reason, class_="missing")


def card(shown: Html, name: str, lines: Sequence[CardLine]) -> Html:
    """Return a picture over its name, and its captions.

    shown  what `picture` or `no_picture` returned
    """
    signs = {"good": "✓ ", "bad": "✗ ", "neutral": ""}
    captions = [
        tag(
            "li",
            tag("span", line.writer, class_="writer"),
            *(tag("span", text or "(empty)", class_="caption", dir="auto") for text in line.texts),
            *(tag("span", signs[b.tone] + b.text, class_=f"badge {b.tone}") for b in line.badges),
        )
        for line in lines
    ]
    figure = tag("figure", shown, tag("figcaption", name))
    return tag("li", figure, tag("ul", *captions), class_="card")


def cards(title: str, items: Sequence[Html]) -> Html:
    """Return a titled row of what `card` returned."""
    listed = tag("ul", *items, class_="cards") if items else note("There are none.")
    return Html(tag("h3", title) + listed)


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
