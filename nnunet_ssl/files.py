"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from nnunet_ssl.errors import UserError


def replace_atomically(path: str, write: Callable[[str], None]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then rename it.

    A kill or a full disk at any moment leaves the previous version in place.

    Args:
        path: The final name.
        write: Called with the temporary name; must leave a complete file there.

    Raises:
        UserError: Where the file cannot be written, e.g. because the disk is full.
    """
    temporary = f"{path}.part"
    with _all_or_nothing([temporary]), _explained(path):
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_atomically(path: str, content: bytes) -> None:
    """Write bytes to ``path``; see ``replace_atomically``."""
    write_together({path: content})


def write_among_others(path: str, content: bytes) -> None:
    """Write bytes that several processes or machines may be writing at once, all the same; the last one stays.

    Raises:
        UserError: Where the file cannot be written.
    """
    own = f"{path}.{socket.gethostname()}-{os.getpid()}"
    write_atomically(own, content)
    os.replace(own, path)


def write_together(contents: Mapping[str, bytes]) -> None:
    """Write files that belong together: where the disk is full, the previous version of all of them stays.

    Args:
        contents: By path.

    Raises:
        UserError: Where a file cannot be written.
    """
    temporaries = {path: f"{path}.part" for path in contents}
    with _all_or_nothing(temporaries.values()):
        for path, content in contents.items():
            with _explained(path), open(temporaries[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            with _explained(path):
                os.replace(temporary, path)


@contextmanager
def _all_or_nothing(temporaries: Iterable[str]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for temporary in temporaries:
            if os.path.exists(temporary):
                os.remove(temporary)
        raise


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """PyTorch and blosc2 name neither the file nor the reason where a disk is full."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        folder = os.path.dirname(os.path.abspath(path))
        free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB" if os.path.isdir(folder) else "no such folder"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} could not be written: {reason[0]} (space left there: {free}). Its previous version, if any, is "
            f"unchanged. Make room or name another folder, and run the command again."
        ) from error
