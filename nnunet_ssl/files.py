"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping


def replace_atomically(path: str, write: Callable[[str], None]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then rename it.

    A kill or a full disk at any moment leaves the previous version in place.

    Args:
        path: The final name.
        write: Called with the temporary name; must leave a complete file there.
    """
    temporary = f"{path}.part"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_atomically(path: str, content: bytes) -> None:
    """Write bytes to ``path``; see ``replace_atomically``."""
    write_together({path: content})


def write_together(contents: Mapping[str, bytes]) -> None:
    """Write files that belong together: where the disk is full, the previous version of all of them stays.

    Args:
        contents: By path.
    """
    temporaries = {path: f"{path}.part" for path in contents}
    try:
        for path, content in contents.items():
            with open(temporaries[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            if os.path.exists(temporary):
                os.remove(temporary)
        raise
