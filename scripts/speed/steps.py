"""Seconds, samples per second and memory of a training step, beside the passes it cannot do without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from setups import MEASURED, Case, autocast_of, make_step, output_shapes
from timing import header, peak_of_process, ratio_of, row, time_in_turns
from torch import nn

from nnunet_ssl.blocks.networks import full_resolution, split_outputs
from nnunet_ssl.losses.predictions import downsample_target
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerFDPL, nnUNetTrainerSupTC

# The stock trainer's bound on the norm of a network's gradient.
_GRADIENT_NORM = 12


def make_floor(trainer: Any, case: Case, num_labeled: int, num_unlabeled: int) -> Callable[[], object]:
    """nnU-Net's own step on the passes that a method needs, with its networks and its optimizer.

    That is: forward passes, nnU-Net's loss on every output that the method compares with labels, the plainest gradient
    on the others (of their mean), backward, clipping, optimizer.

    Supervised needs one pass of the labeled batch; SupTC, SemiTC and SemiTC+ one of two versions of everything.
    DualNet's networks learn from everything and label the unlabeled images. FDPL's learn from everything, with
    nnU-Net's loss on pseudo-labels too, and label two crops of unlabeled images. In stage 1 every network learns from a
    whole batch of labels.
    """
    if not getattr(trainer, "in_second_stage", True):
        num_labeled, num_unlabeled = num_labeled + num_unlabeled, 0
    labeled, unlabeled = (
        torch.randn(n, trainer.num_input_channels, *case.patch).to(trainer.device) for n in (num_labeled, num_unlabeled)
    )
    both = torch.cat([labeled, unlabeled])
    networks = getattr(trainer, "predictors", [trainer.network])
    # What networks learn from: how many have labels, which come first.
    learning: list[tuple[nn.Module, torch.Tensor, int]] = [(networks[0], labeled, num_labeled)]
    labeling: list[tuple[nn.Module, torch.Tensor]] = []
    if isinstance(trainer, nnUNetTrainerSupTC):
        learning = [(networks[0], torch.cat([labeled, labeled, unlabeled, unlabeled]), 2 * num_labeled)]
    elif not num_unlabeled:
        learning = [(network, labeled, num_labeled) for network in networks]
    elif isinstance(trainer, nnUNetTrainerDualNet):
        learning = [(network, both, num_labeled) for network in networks]
        labeling = [(network, unlabeled) for network in networks]
    elif isinstance(trainer, nnUNetTrainerFDPL):
        learning = [(network, both, len(both)) for network in networks]
        # Where images leave no room for a shift, both crops are one.
        crops = torch.cat([unlabeled] * (2 if any(trainer.unlabeled_margin) else 1))
        labeling = [(network, crops) for network in networks]
    shapes = output_shapes(trainer, case)
    targets = [
        downsample_target(
            torch.randint(0, case.num_labels, (num, 1, *case.patch), device=trainer.device).to(torch.int16), shapes
        )
        for _, _, num in learning
    ]

    def loss_of(network: nn.Module, x: torch.Tensor, num: int, target: Any) -> torch.Tensor:
        with_labels, without = split_outputs(network(x), num)
        loss: torch.Tensor = trainer.loss(with_labels, target)
        return loss + full_resolution(without).float().mean() if num < len(x) else loss

    def floor() -> None:
        trainer.optimizer.zero_grad(set_to_none=True)
        with autocast_of(trainer):
            loss = sum(loss_of(*what, target) for what, target in zip(learning, targets))
        scaler = trainer.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        with autocast_of(trainer), torch.no_grad():
            for network, x in labeling:
                network(x)
        if scaler is not None:
            scaler.unscale_(trainer.optimizer)
        for network in networks:
            torch.nn.utils.clip_grad_norm_(network.parameters(), _GRADIENT_NORM)
        if scaler is None:
            trainer.optimizer.step()
        else:
            scaler.step(trainer.optimizer)
            scaler.update()
        loss.item()

    return floor


def make_pair(
    name: str, case: Case, device: torch.device, bfloat16: bool, stage: int = 2
) -> tuple[Any, list[Callable[[], object]]]:
    """A trainer, and its floor and its step."""
    trainer, step = make_step(MEASURED[name], case, device, bfloat16, stage)
    floor = make_floor(trainer, case, trainer.batch_size, getattr(trainer, "unlabeled_batch_size", 0))
    return trainer, [floor, step]


def compare_steps(
    cases: Sequence[Case], names: Sequence[str], device: torch.device, repetitions: int, bfloat16: bool, stage: int
) -> None:
    """Every trainer's step of a stage beside its floor; the stock trainer's ratio says how much of a ratio is noise."""
    header("case", "trainer", "samples", "floor", "step", "samples per second", "ratio (quartiles)")
    for case in cases:
        for name in names:
            trainer, functions = make_pair(name, case, device, bfloat16 and name != "stock", stage)
            samples = trainer.batch_size + getattr(trainer, "unlabeled_batch_size", 0)
            times = time_in_turns(functions, repetitions, device)
            floor, step = sorted(times[:, 0])[len(times) // 2], sorted(times[:, 1])[len(times) // 2]
            seconds = f"{floor:.3f} s", f"{step:.3f} s"
            row(case.name, name, str(samples), *seconds, f"{samples / step:.2f}", ratio_of(times))
            del trainer, functions


def peak_memory(case: Case, name: str, device: torch.device, bfloat16: bool, stage: int) -> float:
    """Peak memory of a trainer and two steps in GiB: of the GPU, or of this process beyond what it had before."""
    before = peak_of_process()
    _, step = make_step(MEASURED[name], case, device, bfloat16, stage)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak_of_process() - before


def compare_memory(cases: Mapping[int, Case], names: Sequence[str], script: Path, again: Sequence[str]) -> None:
    """Peak memory over the stock trainer's on the same plans, each in a process of its own: a peak never falls.

    Args:
        cases: What to train, by the number that ``script`` knows.
        names: Of the trainers.
        script: What to call with ``--memory-of CASE TRAINER``.
        again: Options of this call that the processes need too.
    """
    header("peak memory", *names)
    for number, case in cases.items():
        peaks = []
        for name in names:
            words = [sys.executable, str(script), *again, "--memory-of", str(number), name]
            peaks.append(float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1]))
        stock = dict(zip(names, peaks)).get("stock")
        cells = [f"{peak:.2f} GiB" + (f" ({peak / stock:.2f})" if stock else "") for peak in peaks]
        row(case.name, *cells)


def profile_steps(cases: Sequence[Case], names: Sequence[str], device: torch.device, bfloat16: bool) -> None:
    """Operators on which a step spends more time than its floor, and how often the host waits for a device.

    Waiting shows on CUDA alone, as calls of cudaStreamSynchronize; the stock trainer's step has the count to compare.
    """
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    for case in cases:
        for name in names:
            trainer, functions = make_pair(name, case, device, bfloat16 and name != "stock")
            found = []
            for function in functions:
                function()
                with profile(activities=activities) as profiler:
                    function()
                averages = profiler.key_averages()
                found.append({
                    event.key: (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count)
                    for event in averages
                })  # fmt: skip
            floor, step = found
            more = {key: (time - floor.get(key, (0, 0))[0]) / 1e3 for key, (time, _) in step.items()}
            total = sum(time for time, _ in floor.values()) / 1e3
            most = sorted(more.items(), key=lambda pair: -pair[1])[:8]
            said = ", ".join(f"{key.removeprefix('aten::')} {ms:.0f} ms" for key, ms in most)
            waits = [f.get("cudaStreamSynchronize", (0, 0))[1] for f in found] if on_cuda else "(not on a GPU)"
            print(f"profile {case.name}, {name}: floor {total:.0f} ms; beyond it {said}; waits {waits}", flush=True)
            del trainer, functions
