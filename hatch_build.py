"""Hatchling's hook: the package's long description is README.md with absolute links.

A package index shows the readme outside the repository, where a relative link or picture leads nowhere.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_ABSOLUTE = "(?!https?:|mailto:)"
# A picture's target, then any link's: [text](target), <img src="target">, <a href="target">.
_PICTURE = re.compile(rf'(!\[[^\]]*\]\(|\bsrc="){_ABSOLUTE}(?P<target>[^)\s"]+)')
_LINK = re.compile(rf'(\]\(|\bhref="){_ABSOLUTE}(?P<target>[^)\s"]+)')


class LongDescription(MetadataHookInterface):
    """Fills in the field ``readme``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Links lead to the files of the release's tag: later files may say what this version does not do."""
        source, tag = metadata["urls"]["Source"], f"v{metadata['version']}"
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = _PICTURE.sub(rf"\g<1>{source}/raw/{tag}/\g<target>", text)
        # What starts with # is a heading of the readme itself, which an index gives no name to link to.
        text = re.sub(r"(\]\(|\bhref=\")#", r"\g<1>README.md#", text)
        text = _LINK.sub(rf"\g<1>{source}/blob/{tag}/\g<target>", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
