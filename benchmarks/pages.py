"""Tables in Markdown, and their places in the pages of docs/ and README.md."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(share: float) -> str:
    """A share as a whole number of percent."""
    return f"{100 * share:.0f} %"


def fill(page: Path, tables: dict[str, str]) -> None:
    """Write `tables` into their places in `page`, between <!-- NAME --> and <!-- end -->."""
    text = page.read_text()
    for name, content in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"{page} has no place for: {name}"
        text = pattern.sub(lambda match, content=content: match[1] + content + "\n" + match[2], text)
    page.write_text(text)
