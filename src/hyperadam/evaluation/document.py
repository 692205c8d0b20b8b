"""What a report is made of, and its two renderings: one HTML page, and Markdown.

Both are made of the same blocks, so they say the same. Text is a tuple of spans; whatever comes
from files is escaped here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Code:
    """A name, as typed on a command line."""

    text: str


@dataclasses.dataclass(frozen=True)
class Strong:
    """Words that stand out."""

    text: str


@dataclasses.dataclass(frozen=True)
class Link:
    """Words that lead to an address."""

    text: str
    url: str


Span = str | Code | Strong | Link
Text = tuple[Span, ...]


def say(template: str, *spans: Span) -> Text:
    """Text with its ``{}`` replaced by spans.

    >>> say("{} wins.", Code("adam"))
    (Code(text='adam'), ' wins.')
    """
    words = template.split("{}")
    assert len(words) == len(spans) + 1, template
    out: list[Span] = [words[0]]
    for span, word in zip(spans, words[1:], strict=True):
        out += [span, word]
    return tuple(span for span in out if span != "")


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title; ``anchor`` is what links lead to."""

    level: int
    title: Text
    anchor: str


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: Text


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[Text, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Figures that are seen first: value and what it is."""

    items: tuple[tuple[str, Text], ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: what it says.
        strong: whether it is a row's best.
        tint: from -3, much better than the reference, to 3, much worse; colours the HTML only.
        small: a second line.
    """

    text: str
    strong: bool = False
    tint: int = 0
    small: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that each begin with a name.

    Attributes:
        header: two lines a column, the second may be empty.
        rows: a name, and a cell for each further column.
        caption: what is shown.
        folded: whether the page shows it only when asked.
    """

    header: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    caption: Text
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        name: of its file, without the ending.
        description: for who can't see it.
        page_svg: to stand in the page; its colours follow the page's.
        file_svg: a file of its own.
    """

    name: str
    description: str
    page_svg: str
    file_svg: str


@dataclasses.dataclass(frozen=True)
class Figures:
    """Plots side by side, as many as there is room for.

    ``wide`` ones are larger; the caption may be empty.
    """

    items: tuple[Figure, ...]
    caption: Text
    wide: bool = False


Block = Heading | Paragraph | Bullets | Facts | Table | Figures


@dataclasses.dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: of the page.
        lead: what this is.
        blocks: in their order.
    """

    title: str
    lead: Text
    blocks: tuple[Block, ...]

    def figures(self) -> list[Figure]:
        """All plots."""
        return [item for block in self.blocks if isinstance(block, Figures) for item in block.items]

    def headings(self) -> list[Heading]:
        """All sections' titles."""
        return [block for block in self.blocks if isinstance(block, Heading)]


def to_html(document: Document) -> str:
    """The page, whole: styles and plots are inside, and it loads nothing."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda thing: type(thing).__name__
    source = resources.files("hyperadam.evaluation").joinpath("report.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8")).render(document=document)


FIGURES_FOLDER = "figures"

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _span(span: Span) -> str:
    match span:
        case Code(text):
            # Backslashes are no escapes in Markdown's code, so a name that would end it is plain.
            unsafe = {"`", "|", "\n", "\\"} & set(text)
            return _plain(text) if unsafe or not text.strip() else f"`{text}`"
        case Strong(text):
            return f"**{_plain(text)}**"
        case Link(text, url):
            return f"[{_plain(text)}]({url})"
        case str():
            return _SPECIAL.sub(r"\\\1", span.replace("\n", " "))


def _text(text: Text) -> str:
    return "".join(map(_span, text))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = _plain(cell.text)
    text = f"**{text}**" if cell.strong else text
    return f"{text} ({_plain(cell.small)})" if cell.small else text


def _markdown_block(block: Block) -> Iterator[str]:
    match block:
        case Heading(level, title, _):
            yield f"{'#' * level} {_text(title)}"
        case Paragraph(text):
            yield _text(text)
        case Bullets(items):
            yield "\n".join(f"- {_text(item)}" for item in items)
        case Facts(items):
            yield "\n".join(f"- **{_plain(value)}** {_text(what)}" for value, what in items)
        case Table(header, rows, caption, _):
            yield _text(caption)
            names = [f"{_plain(a)} ({_plain(b)})" if b else _plain(a) for a, b in header]
            lines = [_row(names), _row(["---", *["---:"] * (len(header) - 1)])]
            lines += [_row([_span(Code(name)), *map(_cell, cells)]) for name, cells in rows]
            yield "\n".join(lines)
        case Figures(figures, caption, _):
            if caption:
                yield _text(caption)
            yield "\n".join(
                f"![{_plain(figure.description)}]({FIGURES_FOLDER}/{figure.name}.svg)"
                for figure in figures
            )


def to_markdown(document: Document) -> str:
    """The same in Markdown; its plots are files in :data:`FIGURES_FOLDER`."""
    parts = [f"# {_plain(document.title)}", _text(document.lead)]
    for block in document.blocks:
        parts.extend(_markdown_block(block))
    return "\n\n".join(parts) + "\n"
