"""Docs and package agree."""

import inspect
import re
from pathlib import Path

import ato_optim

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def test_every_public_name_is_in_the_docs():
    text = "\n".join(PAGES.values())
    for name in ato_optim.__all__:
        assert re.search(rf"\b{name}\b", text), name


def test_every_argument_of_ato_and_its_default_are_in_the_quick_start():
    page = PAGES["quickstart.md"]
    for name, parameter in inspect.signature(ato_optim.ATO).parameters.items():
        assert f"`{name}`" in page or f"{name}=" in page, name
        default = parameter.default
        if isinstance(default, float):
            (row,) = [line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line]
            assert any(float(number) == default for number in re.findall(r"[\d.]+(?:e-?\d+)?", row)), (name, default)


def test_links_within_the_docs_lead_somewhere():
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (folder / target).exists(), f"{name}: {target}"


def test_no_table_waits_for_its_figures():
    for name, text in PAGES.items():
        assert not re.search(r"<!-- (?!end)[^>]*-->\n<!-- end -->", text), name
