"""Docs and package agree."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from networks import Flatten, batches, example
from torch.utils.data import DataLoader, TensorDataset

import ato_optim
from ato_optim.cost import count_macs
from ato_optim.schedule import Schedule

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
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        stated = row.split(" | ")[1].strip("`")
        if parameter.default is inspect.Parameter.empty:
            assert stated == "required", name
        elif name not in ("ignored_layers", "forward_fn"):  # said in words
            assert ast.literal_eval(stated) == parameter.default, name


def test_phases_in_the_quick_start_begin_where_they_do_by_default():
    page = PAGES["quickstart.md"]
    search, commit, zero = inspect.signature(ato_optim.ATO).parameters["phases"].default
    rows = {phase: row for row, phase in re.findall(r"^(\|.*?\| `(\w+)` \|.*)$", page, re.MULTILINE)}
    assert rows["warmup"].startswith(f"| 0 to {search} T |")
    assert rows["search"].startswith(f"| {search} T to {commit} T |")
    assert rows["commit"].startswith(f"| {commit} T to {zero} T |")
    assert rows["zero"].startswith(f"| from {zero} T |")
    assert f"`compress()` before {zero} T is an error" in page
    assert f"true from {zero} T on" in page


def test_turns_in_the_quick_start_are_those_of_the_schedule():
    steps, turns = (
        [int(cell.replace(",", "")) for cell in row.strip("| ").split(" | ")[1:]]
        for row in re.search(r"(\| T \|.*)\n.*\n(\| turns \|.*)", PAGES["quickstart.md"]).groups()
    )
    defaults = inspect.signature(ato_optim.ATO).parameters
    schedules = [Schedule.over(total, defaults["phases"].default, defaults["pull_time"].default) for total in steps]
    assert [schedule.turns for schedule in schedules] == turns


def anchors(text):
    """Those that a page's headings have."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_within_the_docs_lead_somewhere():
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if "://" not in target:
                path = folder / (target or name)
                assert path.exists(), f"{name}: {target}"
                assert not anchor or anchor in anchors(path.read_text()), f"{name}: {target}#{anchor}"


def test_no_table_waits_for_its_figures():
    for name, text in PAGES.items():
        assert not re.search(r"<!-- (?!end)[^>]*-->\n<!-- end -->", text), name


LOOPS = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGES["loops.md"], re.MULTILINE | re.DOTALL)
RECIPES = [(title, block) for title, text in LOOPS for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
NEEDS = {"Lightning": "lightning", "Hugging Face Accelerate": "accelerate", "Hugging Face Trainer": "transformers"}


@pytest.fixture(scope="module")
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("title", "recipe"), RECIPES, ids=[title for title, _ in RECIPES])
def test_recipes_for_loops_run_and_prune(title, recipe, tmp_path, request):
    """Each block of the page, after the one at its top."""
    if title in NEEDS:
        pytest.importorskip(NEEDS[title], reason=f"{NEEDS[title]} is not installed: ato_optim[integrations]")
    if title.startswith("Several processes"):
        request.getfixturevalue("one_process")
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*batches(8), strict=True))), batch_size=8)
    names = {
        "make_model": Flatten, "loader": loader, "criterion": torch.nn.CrossEntropyLoss(), "epochs": 4,
        "example_inputs": example(1), "path": str(tmp_path / "run"), "backend": "aot_eager",
    }  # fmt: skip
    torch._dynamo.reset()
    exec(re.search(r"```python\n(.*?)```", PAGES["loops.md"], re.DOTALL)[1], names)
    exec(recipe, names)
    if "small" in recipe:
        macs = [count_macs(model, example(1)) for model in (Flatten(), names["small"])]
        assert macs[1] <= 0.52 * macs[0]
    else:
        assert names["optimizer"].report().step > 0


def test_errors_that_the_page_on_loops_quotes_are_the_packages():
    """What stands in the table in code style is said by the source, but for what torch says."""
    source = "".join(path.read_text() for path in (ROOT / "ato_optim").glob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = PAGES["loops.md"].partition("## What does not work")[2]
    quoted = re.findall(r"`(?:TypeError|ValueError|RuntimeError|UserWarning): ([^`]*)`", table)
    assert len(quoted) >= 8
    for text in quoted:
        if text == "size mismatch":
            continue
        words = re.sub(r"holds 2 ", "holds {len(foreign)} ", text)
        for part in words.replace("model is under", "is under").replace("model is split", "is split").split(" ... "):
            assert part.removeprefix("the state").strip() in source.replace('\\"', '"'), part
