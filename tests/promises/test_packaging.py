"""What a package index shows and hands out."""

from __future__ import annotations

import email.message
import email.parser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nnunet_ssl import __version__

ROOT = Path(__file__).parents[2]
# Targets in Markdown and HTML: [text](target), [text]: target, src="target", href="target".
TARGET = re.compile(r"""\]\(\s*([^)\s]+)|^\s*\[[^\]]+\]:\s*(\S+)|\b(?:src|href)\s*=\s*["']([^"']+)""", re.MULTILINE)


def targets(text: str) -> list[str]:
    return ["".join(groups) for groups in TARGET.findall(text)]


# What is built is built once.
pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def metadata(built: Path) -> email.message.Message:
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def urls(metadata: email.message.Message) -> dict[str, str]:
    return dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL", []))


def test_the_wheel_is_typed_and_has_every_module(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nnunet_ssl").rglob("*.py")}
    assert {*modules, "nnunet_ssl/py.typed", "nnunet_ssl/trainers/nnunet_ssl_trainers.py"} <= names
    assert {name.split("/")[0] for name in names} == {"nnunet_ssl", f"nnunet_ssl-{__version__}.dist-info"}


def test_the_source_distribution_has_what_the_readme_and_the_tests_read(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    documents = {f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "MAINTAINING")}
    linked = {t.split("#")[0] for t in targets((ROOT / "README.md").read_text()) if not re.match("https?:|#", t)}
    scripts = {f"scripts/{p.name}" for p in (ROOT / "scripts").glob("*.sh")}
    missing = {*documents, *linked, *scripts, "CITATION.cff", "LICENSE", "hatch_build.py", "pyproject.toml"} - names
    assert not missing


def test_the_long_description_has_no_relative_link(metadata, urls):
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    found = targets(text)
    assert [target for target in found if not target.startswith("https://")] == []
    release = f"{urls['Source']}/(?:blob|raw)/v{re.escape(__version__)}/"
    own = [re.sub(release, "", target).split("#")[0] for target in found if re.match(release, target)]
    assert own
    assert [path for path in own if not (ROOT / path).is_file()] == []
    # A page of the host is no picture.
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)|<img[^>]*\bsrc=\"([^\"]+)", text)
    assert [p for p in map("".join, pictures) if f"{urls['Source']}/blob/" in p] == []


def test_relative_links_and_pictures_become_absolute(tmp_path):
    (tmp_path / "hatch_build.py").write_text((ROOT / "hatch_build.py").read_text())
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "x"\ndynamic = ["version", "readme"]\nurls.Source = "https://host/x"\n'
        '[tool.hatch.version]\npath = "v.py"\n[tool.hatch.metadata.hooks.custom]\n'
    )
    (tmp_path / "v.py").write_text('__version__ = "1.2"\n')
    (tmp_path / "README.md").write_text(
        "[![a\nb](b.svg)](c.md#d) [e](#f) [g](https://h/i) [m](mailto:n@o)\n"
        '<img width="1" src="j.png"> <a href="k.md">l</a> <img src="https://h/p.png">\n'
    )
    words = [sys.executable, "-m", "hatchling", "metadata", "readme"]
    shown = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    blob, raw = "https://host/x/blob/v1.2", "https://host/x/raw/v1.2"
    assert shown.strip() == (
        f"[![a\nb]({raw}/b.svg)]({blob}/c.md#d) [e]({blob}/README.md#f) [g](https://h/i) [m](mailto:n@o)\n"
        f'<img width="1" src="{raw}/j.png"> <a href="{blob}/k.md">l</a> <img src="https://h/p.png">'
    )


def test_version_date_and_address_are_the_same_everywhere(metadata, urls):
    assert metadata["Version"] == __version__
    citation = dict(re.findall(r"^([a-z-]+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert headings[1] == f"[{__version__}] - {citation['date-released']}"
    assert citation["version"] == __version__
    assert citation["repository-code"] == urls["Homepage"] == urls["Source"]
    assert citation["license"] == metadata["License-Expression"]
    documents = [ROOT / "pyproject.toml", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    address = rf"https://{urlsplit(urls['Source']).netloc}/[\w-]+/nnunet-ssl\b"
    assert {a for p in documents for a in re.findall(address, p.read_text())} == {urls["Source"]}
    assert all(url.startswith(urls["Source"]) for url in urls.values())
