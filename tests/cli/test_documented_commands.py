"""What the pages tell people to type: verbs, options and hyper-parameters exist."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from nnunet_ssl.cli import make_parser
from nnunet_ssl.cli.trainers import built_in_methods
from nnunet_ssl.training.hyperparameters import SHARED, declared

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def commands(text: str) -> list[list[str]]:
    """The words after "nnunet-ssl" wherever it is code, to the end of the line or of the code."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0] for block in blocks for line in block.splitlines()]
    inline = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", inline)]
    found = [re.search(r"(?<![\w-])nnunet-ssl ([a-z].*)", line) for line in lines]
    return [re.sub(r"[\"'()]", " ", match[1]).split() for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page, verbs):
    for verb, *words in commands(page.read_text()):
        assert verb in verbs, f"{page.name}: nnunet-ssl {verb}"
        if verb == "train":
            continue  # nnU-Net's own options
        known = verbs[verb]._option_string_actions
        options = [word for word in words if re.match(r"--?[a-z]", word)]
        assert not [option for option in options if option not in known], f"{page.name}: nnunet-ssl {verb} {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_hyperparameters_that_are_set_exist(page):
    text, methods = page.read_text(), built_in_methods()
    for method, name in re.findall(r"\b([A-Z]\w+)\.([a-z_]+)\b(?!\()", text):
        if method in methods:
            assert name in declared(methods[method].Parameters), f"{page.name}: {method}.{name}"
    for name in re.findall(r"--set '?([a-z_]+)=", text):
        assert name in SHARED, f"{page.name}: {name}"


def test_commands_are_found():
    block = '```\neval "$(nnunet-ssl env --also X)"\nnnunet-ssl train 5 \\\n   --c  # so\n```\n'
    found = commands(f"`nnunet-ssl split\n-d 5` and\n{block}")
    assert found == [["env", "--also", "X"], ["train", "5", "--c"], ["split", "-d", "5"]]
