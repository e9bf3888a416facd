"""What is wrong with a method, and where in its own files."""

from __future__ import annotations

import os
import traceback
import types
from collections.abc import Iterable, Iterator

from nnunet_ssl.training.trainer import SemiSupervisedTrainer


class BrokenPromise(Exception):  # noqa: N818 (what it is called matters more than that it is an error)
    """A method does not keep one of the promises.

    Attributes:
        promise: Name of the promise.
        found: What was found.
        look: Where to look, and what to do.
    """

    def __init__(self, promise: str, found: str, look: str) -> None:
        super().__init__(f"{promise}: {found} {look}")
        self.promise, self.found, self.look = promise, found, look


def own_files(cls: type) -> set[str]:
    """The files in which a trainer and its base trainers are written, but for the one that all derive from."""
    kinds = [
        kind for kind in cls.__mro__ if issubclass(kind, SemiSupervisedTrainer) and kind is not SemiSupervisedTrainer
    ]
    return {code.co_filename for kind in kinds for value in vars(kind).values() for code in _codes(value)}


def calling_place(cls: type) -> str | None:
    """The innermost of the calls that led here that stands in a trainer's own files, as FILE:LINE; None if none."""
    return _innermost(((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)), cls)


def place_of_error(error: BaseException, cls: type) -> str:
    """Where an error was raised: in the trainer's own files where they are part of it, else in anybody's."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]
    return _innermost(frames, cls) or ":".join(map(str, frames[0]))


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".replace(os.linesep, " ")


def _innermost(frames: Iterable[tuple[str, int]], cls: type) -> str | None:
    files = own_files(cls)
    return next((f"{file}:{line}" for file, line in frames if file in files), None)


def _codes(value: object) -> Iterator[types.CodeType]:
    """The code of a method, a property, a static method."""
    for part in ("fget", "fset", "__func__", "__wrapped__"):
        inner = getattr(value, part, None)
        if inner is not None:
            yield from _codes(inner)
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType):
        yield code
