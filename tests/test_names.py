"""One name everywhere: trainer, file, page, test, block in the plans; and pages that say what is true."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.training.hyperparameters import SHARED, HyperParameters, MethodParameters, declared, method_name

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stem(trainer: type) -> str:
    """The file of a trainer: "semi_tc"."""
    return trainer.__module__.rpartition(".")[2]


def rows(kind: type[HyperParameters], *, shared: bool = False) -> list[str]:
    """The table of hyper-parameters that a page must show: a method's own, and shared ones that it starts elsewhere."""
    usual = {name: field.default for name, field in declared(MethodParameters).items()}
    lines = []
    for field in dataclasses.fields(kind):
        if not shared and field.name in SHARED and field.default == usual[field.name]:
            continue
        unit = f" ({field.metadata['unit']})" if field.metadata["unit"] else ""
        lines.append(f"| `{field.name}` | `{json.dumps(field.default)}` | {field.metadata['meaning']}{unit} |")
    return lines


def table_under(text: str, heading: str) -> list[str]:
    """The rows of the tables under a heading, without their own headings."""
    section = re.split(r"^## ", text.partition(f"\n## {heading}")[2], flags=re.MULTILINE)[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


# ---- names --------------------------------------------------------------------------------------------------------


def test_a_file_is_named_after_one_of_its_trainers(trainer_class):
    """SemiTC lies in semi_tc.py, and what derives from it or it derives from may lie there too."""
    together = [method_name(trainer) for trainer in TRAINERS if trainer.__module__ == trainer_class.__module__]
    name = stem(trainer_class)
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name)
    assert name.replace("_", "") in [method.lower() for method in together]


def test_a_trainer_has_a_page_and_tests_of_its_files_name(trainer_class):
    name, method = stem(trainer_class), method_name(trainer_class)
    assert (ROOT / "tests" / "methods" / f"test_{name}.py").is_file()
    text = (METHODS / f"{name}.md").read_text()
    assert f"`{trainer_class.__name__}`" in text
    # The block in the plans.
    assert f"`{method}`" in text
    assert f"methods/{name}.py)" in text


@pytest.mark.parametrize("table", ["README.md", "docs/methods/index.md"])
def test_a_trainer_has_a_row_that_links_to_its_page(trainer_class, table):
    file = ROOT / table
    lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    found = [line for line in lines if f"| `{trainer_class.__name__}` |" in line]
    row = next((line for line in found if ".md)" in line), "")
    assert row, f"{table} has no row of {trainer_class.__name__} with a link to its page"
    linked = {(file.parent / target).resolve() for target in re.findall(r"\]\(([^)]+\.md)\)", row)}
    assert METHODS / f"{stem(trainer_class)}.md" in linked


def test_no_page_is_of_a_method_that_is_gone():
    assert {page.stem for page in METHODS.glob("*.md")} == {"index", *map(stem, TRAINERS)}


# ---- tables -------------------------------------------------------------------------------------------------------


def test_hyperparameters_of_a_page_are_those_of_the_code(trainer_class):
    wanted = rows(trainer_class.Parameters)
    text = (METHODS / f"{stem(trainer_class)}.md").read_text()
    shown = table_under(text, "Hyper-parameters")
    missing = [row for row in wanted if row not in shown]
    assert not missing, "the page lacks:\n" + "\n".join(missing)
    # Several trainers of one file may have hyper-parameters of their own.
    together = [t.Parameters for t in TRAINERS if t.__module__ == trainer_class.__module__]
    wrong = [row for row in shown if not any(row in rows(kind) for kind in together)]
    assert not wrong, "the page has too many, or former ones:\n" + "\n".join(wrong)


def test_shared_hyperparameters_are_those_of_the_code():
    shown = table_under((METHODS / "index.md").read_text(), "Hyper-parameters that all methods share")
    wanted = rows(MethodParameters, shared=True)
    assert shown == wanted, "expected:\n" + "\n".join(wanted)
    # The page says that the last five are of methods alone.
    assert len(declared(MethodParameters)) - len(declared(HyperParameters)) == 5


def test_terms_and_statistics_are_explained(trainer_class):
    explained = "\n".join(table_under((METHODS / f"{stem(trainer_class)}.md").read_text(), "What it logs"))
    told = (*trainer_class.labeled_terms, *trainer_class.unlabeled_terms, *trainer_class.statistic_names)
    assert not [name for name in told if f"`{name}`" not in explained]


# ---- links --------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), (
            f"{page.name} links to {target}; there are {sorted(anchors(file))}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """Paths in backquotes or commands: `tests/promises/test_faults.py`, `python scripts/speed/step.py`."""
    for path in re.findall(r"(?<![\w/.~-])((?:nnunet_ssl|tests|scripts|docs|trainers)/[\w./-]*\w)", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
