"""Label names that tell left from right."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SIDES = {"left", "right", "l", "r", "lt", "rt", "sinister", "dexter", "sin", "dex", "links", "rechts"}


def labels_that_name_sides(names: Iterable[str]) -> list[str]:
    """Those names with a word for a side in them: ``left_lung``, ``Kidney-R``, ``LungRight``; not ``vertebra_L1``."""
    return [name for name in names if _SIDES & set(_words(name))]


def _words(name: str) -> list[str]:
    separated = re.sub(r"(?<![A-Za-z])[A-Za-z]\d+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return [word.lower() for word in re.split(r"[^A-Za-z]+", separated) if word]
