"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable


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

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(content)

    replace_atomically(path, write)
