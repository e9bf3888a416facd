#!/usr/bin/env python
"""Cost of a training step beside the stock trainer's, and of the fields beside batchgeneratorsv2's elastic transform.

Every figure is a ratio of two things measured in turns in one run, on noise that lies ready in memory. "stock" is
nnUNetTrainer's step on as many samples as both branches process together, with the same network. "floor" is the passes
that a trainer with two networks needs: one forward and backward pass of each on the same batch, and for FDPL the
teachers' passes without gradient.

    python scripts/benchmark_step.py [--device cuda] [--only transforms]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerFDPL, nnUNetTrainerSemiTC
from nnunet_ssl.monitor import Monitor
from nnunet_ssl.plans import shrink
from nnunet_ssl.spatial import align_displacements, sample_displacement, solver_grid, warp, without_margin
from nnunet_ssl.unlabeled_data import UnlabeledCase

# Patch, batch (labeled + unlabeled) and the stages nnU-Net plans for such a patch.
CASES = {"2d 256x256": ((256, 256), 4, 7), "3d 64x64x64": ((64, 64, 64), 2, 5)}
NUM_LABELS = 4
TRAINERS = (nnUNetTrainer, nnUNetTrainerSemiTC, nnUNetTrainerDualNet, nnUNetTrainerFDPL)


def make_plans(patch: tuple[int, ...], stages: int) -> dict:
    """nnU-Net's default network for a patch, as its planner writes it."""
    dims = len(patch)
    largest = 512 if dims == 2 else 320
    kernel, stride = [[3] * dims] * stages, [[1] * dims] + [[2] * dims] * (stages - 1)
    name = "2d" if dims == 2 else "3d_fullres"
    resampling = dict.fromkeys(("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"), "none")
    configuration = {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [2 * side for side in patch],
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **resampling,
        "resampling_fn_data_kwargs": {},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [min(32 * 2**i, largest) for i in range(stages)],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": kernel,
                "strides": stride,
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": dims == 2,
    }
    return {
        "dataset_name": "Dataset900_Benchmark",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "configurations": {name: configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def make_trainer(
    cls: type, patch: tuple[int, ...], stages: int, batch_size: int, device: torch.device
) -> nnUNetTrainer:
    plans = make_plans(patch, stages)
    (name,) = plans["configurations"]
    plans = shrink(plans, name, batch_size=batch_size) | {"continue_training": False}
    # Only the second stage costs more than the stock trainer; every transform moves something.
    plans["ssl"] = {"supervised_fraction": 0.0, "identity_probability": 0.0}
    labels = {"background": 0, **{f"structure {i}": i for i in range(1, NUM_LABELS)}}
    dataset_json = {"channel_names": {"0": "x"}, "labels": labels, "file_ending": ".nii.gz"}
    trainer = cls(plans, name, 0, dataset_json, device)
    # initialize looks into the folder to see how the data are stored.
    Path(trainer.preprocessed_dataset_folder).mkdir(parents=True, exist_ok=True)
    (Path(trainer.preprocessed_dataset_folder) / "x.b2nd").touch()
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()
    return trainer


def make_batches(trainer: nnUNetTrainer, patch: tuple[int, ...]) -> tuple[dict, dict]:
    """A labeled and an unlabeled batch of noise; the second is empty for the stock trainer."""
    data = torch.randn(trainer.batch_size, 1, *patch)
    target = torch.randint(0, NUM_LABELS, (trainer.batch_size, 1, *patch)).to(torch.int16)
    larger = getattr(trainer, "unlabeled_patch_size", patch)
    unlabeled, weak = (torch.randn(getattr(trainer, "unlabeled_batch_size", 0), 1, *larger) for _ in range(2))
    return {"data": data, "target": target, "keys": []}, {"data": unlabeled, "weak": weak, "keys": []}


def targets_for_deep_supervision(trainer: nnUNetTrainer, target: torch.Tensor) -> list[torch.Tensor]:
    shapes = [
        [round(side * s) for side, s in zip(target.shape[2:], scale)]
        for scale in trainer._get_deep_supervision_scales()
    ]
    return [torch.nn.functional.interpolate(target.float(), s, mode="nearest-exact").to(target.dtype) for s in shapes]


def make_step(
    cls: type, patch: tuple[int, ...], batch: int, stages: int, device: torch.device
) -> tuple[nnUNetTrainer, Callable[[], object]]:
    """A trainer, and a function that does one training step on a batch in memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(cls, patch, stages, batch, device)
    labeled, unlabeled = make_batches(trainer, patch)
    if cls is nnUNetTrainer:
        labeled["target"] = targets_for_deep_supervision(trainer, labeled["target"])
    else:
        trainer.dataloader_unlabeled = iter(lambda: unlabeled, None)
    return trainer, lambda: trainer.train_step(labeled)


def make_floor(trainer: nnUNetTrainer, patch: tuple[int, ...]) -> Callable[[], object]:
    """One forward and backward pass of each of a trainer's networks on its whole batch, with nnU-Net's loss.

    FDPL's networks label both unlabeled crops besides.
    """
    labeled = make_batches(trainer, patch)[0]["data"]
    unlabeled = torch.randn(trainer.unlabeled_batch_size, 1, *patch).to(trainer.device)
    data = torch.cat([labeled.to(trainer.device), unlabeled])
    target = torch.randint(0, NUM_LABELS, data.shape, device=trainer.device).to(torch.int16)
    targets = targets_for_deep_supervision(trainer, target)
    crops = [torch.cat([unlabeled] * 2)] * 2 if isinstance(trainer, nnUNetTrainerFDPL) else []

    def floor() -> None:
        trainer.optimizer.zero_grad(set_to_none=True)
        for network in trainer.networks:
            with trainer.autocast():
                loss = trainer.loss(network(data), targets)
            (loss if trainer.grad_scaler is None else trainer.grad_scaler.scale(loss)).backward()
        for network, images in zip(trainer.networks, crops):
            with trainer.autocast(), torch.no_grad():
                network(images)

    return floor


def time_in_turns(functions: list[Callable[[], object]], repetitions: int, device: torch.device) -> np.ndarray:
    """Seconds (repetitions, functions). They take turns, forth and back: a busy machine slows all of them alike."""
    times = np.empty((repetitions + 2, len(functions)))
    for repetition in range(len(times)):
        order = range(len(functions)) if repetition % 2 else reversed(range(len(functions)))
        for i in order:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            functions[i]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[repetition, i] = time.perf_counter() - start
    return times[2:]  # the first two warm up


def keep_memory() -> None:
    """Let this process keep what it frees, as PyTorch does on CUDA.

    Else glibc returns every large tensor to the kernel at once, and how long that takes varies by a tenth of a step
    from one step to the next.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        library.mallopt(m_mmap_max, 0)
        library.mallopt(m_trim_threshold, 2**31 - 1)


def compare_steps(device: torch.device, repetitions: int, trainers: list[str]) -> None:
    """SemiTC beside the stock trainer on as many samples as its branches process, the others beside their floors.

    The stock trainer beside itself says how much of a ratio is noise.
    """
    keep_memory()
    for name, (patch, batch, stages) in CASES.items():
        if "SemiTC" in trainers:
            _, stock = make_step(nnUNetTrainer, patch, 2 * batch, stages, device)
            _, again = make_step(nnUNetTrainer, patch, 2 * batch, stages, device)
            _, siamese = make_step(nnUNetTrainerSemiTC, patch, batch, stages, device)
            times = time_in_turns([stock, again, siamese], repetitions, device)
            title = f"step {name}, {2 * batch} samples"
            print_ratio(title, times[:, [0, 1]], "stock", "stock again")
            print_ratio(title, times[:, [0, 2]], "stock", "SemiTC")
            del stock, again, siamese
        for cls in (nnUNetTrainerDualNet, nnUNetTrainerFDPL):
            short = cls.__name__.removeprefix("nnUNetTrainer")
            if short in trainers:
                trainer, step = make_step(cls, patch, batch, stages, device)
                times = time_in_turns([make_floor(trainer, patch), step], repetitions, device)
                print_ratio(f"step {name}, {batch} samples", times, "floor", short)
                del trainer, step


def print_ratio(title: str, times: np.ndarray, reference: str, name: str) -> None:
    """Median seconds, and median and quartiles of the single turns' ratios.

    Args:
        title: Of the comparison.
        times: Seconds (repetitions, 2), of the reference and of what is compared.
        reference: Name of the first.
        name: Of the second.
    """
    seconds = np.median(times, axis=0)
    low, ratio, high = np.percentile(times[:, 1] / times[:, 0], [25, 50, 75])
    print(f"{title}: {reference} {seconds[0]:.3f} s, {name} {seconds[1]:.3f} s, ratio {ratio:.3f} "
          f"({low:.2f} to {high:.2f})", flush=True)  # fmt: skip


def compare_fields(repetitions: int) -> None:
    """Two fields, both warps and the alignment of a pair of branches, beside two SpatialTransforms; one core.

    Once for the image alone, and once with its labels, which both branches need for training as the stock loader does.
    """
    torch.set_num_threads(1)
    for name, (patch, _, _) in CASES.items():
        image, labels = torch.randn(1, *patch), torch.randint(0, NUM_LABELS, (1, *patch)).to(torch.int16)
        for what, arrays in (
            ("image", {"image": image}),
            ("image and labels", {"image": image, "segmentation": labels}),
        ):
            functions = [make_stock_transforms(patch, arrays), make_transforms(patch, arrays)]
            reference, seconds = np.median(time_in_turns(functions, repetitions, torch.device("cpu")), axis=0)
            print(
                f"transforms {name}, {what}, pair of branches, 1 core: batchgeneratorsv2 (no inverse) "
                f"{1e3 * reference:.0f} ms, ours with alignment {1e3 * seconds:.0f} ms, "
                f"{reference / seconds:.1f} times faster"
            )


def make_stock_transforms(patch: tuple[int, ...], arrays: dict[str, torch.Tensor]) -> Callable[[], object]:
    transform = SpatialTransform(
        patch, 0, False, p_elastic_deform=1.0, elastic_deform_scale=(0.1, 0.1), elastic_deform_magnitude=(5.0, 5.0)
    )
    return lambda: [transform(**arrays) for _ in range(2)]


def make_transforms(patch: tuple[int, ...], arrays: dict[str, torch.Tensor]) -> Callable[[], object]:
    strength = {"smoothness": 0.1, "displacement_std": 0.02}
    grid = solver_grid(patch, strength["smoothness"])
    generator = torch.Generator().manual_seed(0)

    def transform() -> None:
        fields = [sample_displacement(1, patch, **strength, margin=grid.margin, generator=generator) for _ in range(2)]
        for field in fields:
            on_patch = without_margin(field, grid.margin)
            for kind, array in arrays.items():
                warp(array[None], on_patch, "linear" if kind == "image" else "nearest")
        align_displacements(*fields, grid=grid)

    return transform


def peak_memory(case: str, cls_name: str, device: torch.device) -> float:
    """Peak memory of two steps in GB: of the device on CUDA, of this process beyond its start on the CPU."""
    import resource

    patch, batch, stages = CASES[case]
    cls = next(c for c in TRAINERS if c.__name__ == cls_name)
    # SemiTC processes every example twice; the other trainers get as many samples as it has passes.
    _, step = make_step(cls, patch, batch if cls is nnUNetTrainerSemiTC else 2 * batch, stages, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before


def compare_memory(device: torch.device) -> None:
    """Each in a process of its own: the peak of a process never falls."""
    for case in CASES:
        peaks = {}
        for cls in TRAINERS:
            words = [sys.executable, __file__, "--device", device.type, "--memory-of", case, cls.__name__]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            peaks[cls.__name__] = float(output.split()[-1])
        stock = peaks[nnUNetTrainer.__name__]
        said = ", ".join(
            f"{name.removeprefix('nnUNetTrainer') or 'stock'} {p:.2f} GB ({p / stock:.2f})" for name, p in peaks.items()
        )
        print(f"peak memory {case}: {said}", flush=True)


def monitor_cost(device: torch.device, repetitions: int) -> None:
    """What looking at two unlabeled cases every epoch and drawing them every 50 adds to epochs of nnU-Net's length."""
    steps_per_epoch, every = 250, 50
    for name, (patch, batch, stages) in CASES.items():
        for cls in TRAINERS[1:]:
            trainer, step = make_step(cls, patch, batch, stages, device)
            folder = Path(trainer.preprocessed_dataset_folder)
            sides = [1] * (3 - len(patch)) + list(trainer.unlabeled_patch_size)
            for case in ("a", "b"):
                noise = np.random.default_rng(0).normal(size=(1, *sides)).astype(np.float32)
                blosc2.asarray(noise, urlpath=str(folder / f"{case}.b2nd"), mode="w")
            cases = [UnlabeledCase(case, str(folder), "noise") for case in ("a", "b")]
            monitor = Monitor(cases, trainer.unlabeled_patch_size)
            looks = [functools.partial(monitor.look, trainer, file) for file in (None, str(folder.parent / "a.png"))]
            seconds, look, picture = np.median(time_in_turns([step, *looks], repetitions, device), axis=0)
            share = (look * (every - 1) + picture) / every / (steps_per_epoch * seconds)
            who = f"{name}, {cls.__name__.removeprefix('nnUNetTrainer')}"
            print(f"monitor {who}: step {seconds:.2f} s, look {look:.2f} s, with picture {picture:.2f} s; "
                  f"{100 * share:.2f} % of {steps_per_epoch} steps", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument(
        "--only", choices=("memory", "monitor", "steps", "transforms"), help="one part of the benchmark"
    )
    timed = ("SemiTC", "DualNet", "FDPL")
    parser.add_argument("--trainers", nargs="+", choices=timed, default=timed, help="whose steps are timed")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "TRAINER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[name] = str(Path(folder) / name)
        if arguments.memory_of:
            print(peak_memory(*arguments.memory_of, device))
            return
        parts = {
            "memory": lambda: compare_memory(device),
            "monitor": lambda: monitor_cost(device, arguments.repetitions),
            "steps": lambda: compare_steps(device, arguments.repetitions, arguments.trainers),
            "transforms": lambda: compare_fields(arguments.repetitions),
        }
        for name, part in parts.items():
            if arguments.only in (None, name):
                part()


if __name__ == "__main__":
    main()
