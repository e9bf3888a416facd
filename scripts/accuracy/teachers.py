#!/usr/bin/env python
"""Who could teach whom: on unlabeled cases with hidden labels, where a teacher is right and the student is wrong.

The student is a trained network that sees patches with nnU-Net's changes of intensity. Teachers are the same network on
the patch without them, each further network of its checkpoint (partner, averaged teacher), other models, and whole
images predicted with mirroring. A method can gain only where a teacher is right and the student wrong much more often
than the contrary. Hidden labels are read: for analysis alone, of splits on which nothing is reported. Nothing is
trained.

    python scripts/accuracy/teachers.py --preprocessed PREPROCESSED/Dataset503_Hippocampus --fold 5
        --model RESULTS/TRAINER__PLANS__3d_fullres --others other=RESULTS/TRAINER__PLANS2__3d_fullres --out teachers.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import full_resolution
from nnunet_ssl.data.views import Views
from nnunet_ssl.files import write_atomically
from nnunet_ssl.training.checkpoint import COMPANIONS, STATE_KEY

# Distance to the border of the structures, in voxels.
SHELLS = ((0.0, 1.5), (1.5, 3.5), (3.5, np.inf))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preprocessed", type=Path, required=True, help="the data set's folder in nnUNet_preprocessed")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the student, TRAINER__PLANS__CONFIGURATION"
    )
    parser.add_argument("--fold", type=int, required=True, help="that hides the labels")
    parser.add_argument("--others", nargs="*", default=[], metavar="NAME=FOLDER", help="further models, of that fold")
    parser.add_argument("--cases", type=int, default=20, help="how many unlabeled cases, the first ones")
    parser.add_argument("--patches", type=int, default=4, help="patches per case")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    return parser.parse_args()


def predictor_of(folder: Path, fold: int, device: torch.device) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (str(fold),), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    return predictor


def companions_of(folder: Path, fold: int, predictor: nnUNetPredictor) -> dict[str, nn.Module]:
    """Further networks of a checkpoint that can stand for the plan's."""
    file = folder / f"fold_{fold}" / "checkpoint_final.pth"
    state = torch.load(file, map_location="cpu", weights_only=False).get(STATE_KEY, {})
    networks = {}
    for name, companion in state.get(COMPANIONS, {}).items():
        if companion["architecture"] is None:
            continue
        architecture = companion["architecture"]
        channels = len(predictor.dataset_json["channel_names"])
        heads = predictor.label_manager.num_segmentation_heads
        networks[name] = get_network_from_plans(
            architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
            channels, heads, deep_supervision=False,
        )  # fmt: skip
        networks[name].load_state_dict(companion["weights"])
    return networks


def strong_and_weak(patch_size: tuple[int, ...]) -> Views:
    """nnU-Net's changes of intensity; the first of its transforms, which moves voxels, is left out."""
    steps = nnUNetTrainer.get_training_transforms(patch_size, (0.0, 0.0), None, None, False)
    return Views(ComposeTransforms(steps.transforms[1:]), ("strong", "weak"))


def patch_of(volume: np.ndarray, start: list[int], size: tuple[int, ...]) -> np.ndarray:
    """From ``start``, padded with zeros where the volume ends, (C, *size)."""
    box = (slice(None), *(slice(s, s + n) for s, n in zip(start, size)))
    part = volume[box]
    return np.pad(part, [(0, 0), *((0, n - have) for n, have in zip(size, part.shape[1:]))])


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    student = predictor_of(arguments.model, arguments.fold, device)
    networks: dict[str, nn.Module] = {"weak view": student.network}
    networks |= companions_of(arguments.model, arguments.fold, student)
    for word in arguments.others:
        name, _, folder = word.partition("=")
        networks[name] = predictor_of(Path(folder), arguments.fold, device).network
    for network in networks.values():
        network.to(device).eval()
    plan = student.configuration_manager
    size = tuple(plan.patch_size)
    views = strong_and_weak(size)
    fold = json.loads((arguments.preprocessed / "splits_final.json").read_text())[arguments.fold]
    cases = fold["unlabeled"][: arguments.cases]
    folder = arguments.preprocessed / plan.data_identifier
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    counts: dict[tuple[str, str, int], np.ndarray] = {}
    labels = {value: name for name, value in student.dataset_json["labels"].items()}
    for case in cases:
        image, truth = load(folder, case)
        whole = predict(student, image)
        border = distance_transform_edt(truth == 0) + distance_transform_edt(truth > 0)
        for _ in range(arguments.patches):
            start = [int(rng.integers(0, max(1, have - want + 1))) for have, want in zip(image.shape[1:], size)]
            crops = [
                patch_of(np.asarray(v)[None] if v.ndim < 4 else v, start, size) for v in (image, truth, whole, border)
            ]
            inside = patch_of(np.ones_like(truth)[None], start, size)[0] > 0
            seen = views(image=torch.from_numpy(crops[0]).float())
            answers = {name: label_of(network, seen["weak"], device) for name, network in networks.items()}
            answers["whole image"] = crops[2][0]
            mine = label_of(student.network, seen["strong"], device)
            for name, theirs in answers.items():
                count(counts, name, mine, theirs, crops[1][0], crops[3][0], inside, labels)
    rows = table(counts)
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(str(arguments.out), text.getvalue().encode())
    for row in rows:
        print(" | ".join(str(cell) for cell in row))


def load(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    """A preprocessed image (C, *S), and its hidden labels (*S), which lie beside it."""
    image, segmentation, _, _ = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    return np.asarray(image[:]), np.maximum(np.asarray(segmentation[:])[0], 0)


def predict(student: nnUNetPredictor, image: np.ndarray) -> np.ndarray:
    """Labels (*S) of a whole image, with mirroring where the training mirrors."""
    logits = student.predict_logits_from_preprocessed_data(torch.from_numpy(image).float())
    return logits.argmax(0).cpu().numpy()


@torch.no_grad()
def label_of(network: nn.Module, patch: Tensor, device: torch.device) -> np.ndarray:
    return full_resolution(network(patch[None].to(device))).argmax(1)[0].cpu().numpy()


def count(
    counts: dict[tuple[str, str, int], np.ndarray], teacher: str, mine: np.ndarray, theirs: np.ndarray,
    truth: np.ndarray, border: np.ndarray, inside: np.ndarray, labels: dict[int, str],
) -> None:  # fmt: skip
    """Add voxels where only the teacher is right, and where only the student is, by structure and shell."""
    helps, harms = (theirs == truth) & (mine != truth) & inside, (mine == truth) & (theirs != truth) & inside
    for value, name in labels.items():
        of_structure = truth == value
        for shell, (low, high) in enumerate(SHELLS):
            place = of_structure & (border >= low) & (border < high)
            found = np.array([(helps & place).sum(), (harms & place).sum(), place.sum()])
            counts[teacher, name, shell] = counts.get((teacher, name, shell), 0) + found


def table(counts: dict[tuple[str, str, int], np.ndarray]) -> list[list[Any]]:
    """Rows by teacher and structure, over all shells and for each."""
    rows: list[list[Any]] = [
        ["teacher", "structure", "distance to the border", "teacher right", "student right", "ratio"]
    ]
    for teacher in dict.fromkeys(key[0] for key in counts):
        every = np.sum([value for key, value in counts.items() if key[0] == teacher], 0)
        rows.append([teacher, "all", "any", *map(int, every[:2]), _ratio(every)])
        for structure in dict.fromkeys(key[1] for key in counts):
            for shell, (low, high) in enumerate(SHELLS):
                found = counts[teacher, structure, shell]
                rows.append([teacher, structure, f"{low} to {high} voxels", *map(int, found[:2]), _ratio(found)])
    return rows


def _ratio(helps_and_harms: np.ndarray) -> str:
    helps, harms = helps_and_harms[:2]
    return f"{helps / harms:.2f}" if harms else ""


if __name__ == "__main__":
    main()
