"""The trainers in the folders that nnUNet_extTrainer names."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from nnunetv2.utilities.find_class_by_name import temporarily_cleanup_imports_from_path, temporarily_extend_syspath

from nnunet_ssl.errors import UserError


def load_trainers(base: type) -> dict[str, list[type]]:
    """The trainers that nnU-Net finds in each folder, imported as nnU-Net does it.

    Args:
        base: What they derive from; it and abstract classes are left out.

    Returns:
        Folders in the order in which nnU-Net looks for a trainer; of each, classes in that order too.

    Raises:
        UserError: For a file that cannot be imported; nnU-Net's own look-up fails on it too.
    """
    found: dict[str, list[type]] = {}
    for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep):
        if not folder.strip() or not os.path.exists(folder):
            continue
        # Modules of one folder must not stand for those of the same name in another one.
        with temporarily_extend_syspath(folder), temporarily_cleanup_imports_from_path(folder):
            classes = (c for module in _modules(folder, "") for c in vars(module).values() if isinstance(c, type))
            wanted = (c for c in classes if issubclass(c, base) and c is not base and not inspect.isabstract(c))
            found[folder] = list(dict.fromkeys(wanted))
    return found


def _modules(folder: str, package: str) -> Iterator[ModuleType]:
    """All modules in a folder, then those in its packages."""
    entries = list(pkgutil.iter_modules([folder]))
    for entry in entries:
        name = f"{package}{entry.name}"
        if entry.ispkg:
            continue
        try:
            module = importlib.import_module(name)
        except Exception as error:
            # nnU-Net passes over what it cannot find under the name that the folder suggests.
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                continue
            raise UserError(
                f"{os.path.join(folder, entry.name)}.py cannot be imported: {type(error).__name__}: {error}. nnU-Net "
                f"fails on it too when it looks for a trainer. Correct it, or take its folder out of nnUNet_extTrainer."
            ) from error
        yield module
    for entry in entries:
        if entry.ispkg:
            yield from _modules(os.path.join(folder, entry.name), f"{package}{entry.name}.")
