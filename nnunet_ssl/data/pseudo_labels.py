"""Stored pseudo-labels of a fold: a label map in the voxels of each preprocessed unlabeled image, and a manifest.

    <dataset>/pseudo_labels/<data identifier>/fold_<fold>/<name>/
        CASE.b2nd            (*S) int16: the label; where that is uncertain, -1 - label
        CASE.json            scores, and whether the case is kept
        settings.json        what they are made with
        pseudo_labels.json   the manifest of all cases, written last

A fold that was made inside another one has the pseudo-labels of that one.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.splits import cases_to_report, outer_fold
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replace_atomically, write_among_others
from nnunet_ssl.nnunet.folders import read_json

FOLDER = "pseudo_labels"
MANIFEST = "pseudo_labels.json"
SETTINGS = "settings.json"
# What the loader gives where a label is uncertain. Not -1: nnU-Net's transforms make background of that.
UNCERTAIN = -2
_COMPRESSION = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1}


def as_stored(labels: np.ndarray, uncertain: np.ndarray) -> np.ndarray:
    """Labels and where they are uncertain (boolean), as one map (*S) in int16."""
    labels = labels.astype(np.int16)
    return np.where(uncertain, -1 - labels, labels)


def likeliest(stored: np.ndarray) -> np.ndarray:
    """The labels of a stored map, uncertain ones too."""
    return np.where(stored < 0, -1 - stored, stored)


def as_learned(stored: np.ndarray) -> np.ndarray:
    """A stored map as a training learns from it: ``UNCERTAIN`` where it is."""
    return np.where(stored < 0, UNCERTAIN, stored).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class PseudoLabels:
    """A set of pseudo-labels of a fold: its folder."""

    folder: Path

    @classmethod
    def of(cls, preprocessed_folder: str, fold: int | str, name: str) -> PseudoLabels:
        """A set by its name; it may not be there yet.

        Args:
            preprocessed_folder: nnU-Net's folder of the configuration, ``<dataset>/<data_identifier>``.
            fold: That is trained.
            name: Of the set.

        Raises:
            UserError: For a name that cannot be a folder's.
        """
        if not name or name.startswith(".") or set(name) & set("/\\\0"):
            raise UserError(f"Pseudo-labels are called {name!r}; expected a name that can be a folder's.")
        base = Path(preprocessed_folder)
        of_fold = outer_fold(base.parent / "splits_final.json", fold)
        return cls(base.parent / FOLDER / base.name / f"fold_{of_fold}" / name)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def file(self, case: str) -> Path:
        """Of a case's labels."""
        return self.folder / f"{case}.b2nd"

    def load(self, case: str) -> blosc2.NDArray:
        """The stored map (*S) of a case; read as it is sliced."""
        return blosc2.open(urlpath=str(self.file(case)), mode="r", dparams={"nthreads": 1})

    def scores(self, case: str) -> dict[str, Any]:
        """What is noted of a case."""
        scores: dict[str, Any] = read_json(self._scores_file(case), "Label the case again.")
        return scores

    def _scores_file(self, case: str) -> Path:
        return self.folder / f"{case}.json"

    @property
    def manifest_file(self) -> Path:
        """Is there once all cases are."""
        return self.folder / MANIFEST

    def manifest(self) -> dict[str, Any]:
        """What is known of the set: "settings", "preprocessing", "learned_from", and "cases" by their identifiers.

        Raises:
            UserError: Where it is missing or damaged.
        """
        content = read_json(self.manifest_file, "It is written once all cases have pseudo-labels.")
        names = ("settings", "preprocessing", "learned_from", "cases")
        if not isinstance(content, dict) or any(name not in content for name in names):
            raise UserError(f"{self.manifest_file} lacks one of {', '.join(names)}; make the pseudo-labels again.")
        return content

    def kept(
        self, cases: Sequence[UnlabeledCase], labeled: Sequence[str], reported: Collection[str], preprocessing: Any
    ) -> list[UnlabeledCase]:
        """Those unlabeled cases of a training whose pseudo-labels are kept.

        Args:
            cases: The unlabeled cases.
            labeled: Those it trains on.
            reported: Validation cases, whose labels must not have made the pseudo-labels.
            preprocessing: See ``preprocessing.preprocessing_settings``.

        Raises:
            UserError: Where none is left, the labels do not fit the images, or come from cases that are reported on.
        """
        manifest = self.manifest()
        leaked = sorted(set(manifest["learned_from"]) & set(reported))
        if leaked and not manifest["settings"].get("may_know_validation_cases"):
            raise UserError(
                f"The pseudo-labels in {self.folder} come from models that have learned from {len(leaked)} validation "
                f"cases of this fold, e.g. {leaked[0]}. Make them again with models that have not."
            )
        if manifest["preprocessing"] != preprocessing:
            raise UserError(f"The pseudo-labels in {self.folder} were made for other plans. Make them again with -p.")
        names = {case for case, known in manifest["cases"].items() if known["kept"]} - set(labeled)
        found = [case for case in cases if case.identifier in names]
        if not found:
            raise UserError(
                f"Of {len(manifest['cases'])} cases in {self.folder} none is kept that is unlabeled in this fold. The "
                f"manifest {MANIFEST} says why; a smaller --agreement-from keeps more."
            )
        for case in found:
            image = blosc2.open(urlpath=os.path.join(case.folder, f"{case.identifier}.b2nd"), mode="r").shape[1:]
            if not self.file(case.identifier).is_file() or tuple(self.load(case.identifier).shape) != tuple(image):
                raise UserError(
                    f"{self.file(case.identifier)} is missing or does not fit its image of {list(image)} voxels. Make "
                    f"the pseudo-labels again."
                )
        return found

    # ---- writing -----------------------------------------------------------------------------------------------------

    def start(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Note what the set is made with; parts of the work on several machines do so at once.

        Args:
            settings: Fit for JSON.
            overwrite: Remove what is there.

        Raises:
            UserError: Where the set was begun with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / SETTINGS
        if overwrite:
            for old in sorted(self.folder.iterdir(), key=lambda path: path.name != MANIFEST):
                old.unlink()
        found = read_json(file, "") if file.is_file() else settings
        different = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
        if different:
            raise UserError(
                f"{self.folder} was begun with other settings (different: {', '.join(different)}). Add --overwrite, or "
                f"choose another --name."
            )
        _write_json(file, settings)

    def is_done(self, case: str, sources: Sequence[Path]) -> bool:
        """Whether a case is there, and newer than what it is made of."""
        files = (self.file(case), self._scores_file(case))
        if not all(file.is_file() for file in files):
            return False
        return min(f.stat().st_mtime for f in files) >= max((s.stat().st_mtime for s in sources), default=0.0)

    def write_case(self, case: str, stored: np.ndarray, scores: Mapping[str, Any], patch_size: Sequence[int]) -> None:
        """Write a case, its scores last.

        Args:
            case: Its identifier.
            stored: (*S), see ``as_stored``.
            scores: Fit for JSON; "kept", "why" and what else is known.
            patch_size: Of the plans, in voxels, for the file's blocks.
        """
        array = np.ascontiguousarray(stored, dtype=np.int16)
        blocks, chunks = comp_blosc2_params((1, *array.shape), tuple(patch_size), array.itemsize)
        parameters = {"chunks": chunks[1:], "blocks": blocks[1:], "cparams": _COMPRESSION, "mode": "w"}
        replace_atomically(str(self.file(case)), lambda part: blosc2.asarray(array, urlpath=part, **parameters))
        _write_json(self._scores_file(case), scores)

    def finish(self, cases: Sequence[str], preprocessing: Any, learned_from: Collection[str]) -> dict[str, Any] | None:
        """Write the manifest where all cases are there.

        Args:
            cases: Identifiers.
            preprocessing: See ``preprocessing.preprocessing_settings``.
            learned_from: All cases whose labels have had a part in them.

        Returns:
            The manifest; None where cases are still missing.
        """
        if not all(self._scores_file(case).is_file() for case in cases):
            return None
        manifest = {
            "name": self.folder.name,
            "settings": read_json(self.folder / SETTINGS, ""),
            "preprocessing": preprocessing,
            "learned_from": sorted(learned_from),
            "cases": {case: self.scores(case) for case in sorted(cases)},
        }
        _write_json(self.manifest_file, manifest)
        return manifest


def reported_cases(preprocessed_folder: str, fold: int | str, train: Sequence[str]) -> set[str]:
    """The validation cases that pseudo-labels of a fold must not know: none with fold "all"."""
    return set(cases_to_report(Path(preprocessed_folder).parent / "splits_final.json", fold)) - set(train)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_among_others(str(file), json.dumps(content, indent=1).encode())
