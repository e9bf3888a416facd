"""What a method costs on a GPU, beside nnU-Net's own trainer: waits, recompilations, time and memory of a step."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.predictions import downsample_target
from nnunet_ssl.testing.bench import Bench, without_drawing
from nnunet_ssl.testing.broken import calling_place
from nnunet_ssl.testing.check import require_device
from nnunet_ssl.testing.networks import networks_of
from nnunet_ssl.testing.steps import feed
from nnunet_ssl.testing.tiny import TinyDataset

_WARM_UP, _TIMED = 3, 10


class Pass(NamedTuple):
    """A network's pass in a step: how many examples, and whether a gradient comes back."""

    examples: int
    with_gradient: bool


def measure(cls: type, device: str) -> list[str]:
    """What a trainer's step costs on a GPU, in words, a line each.

    Args:
        cls: Derived from SemiSupervisedTrainer.
        device: "cuda".

    Raises:
        UserError: For a device that this machine does not have, or that tells nothing of all this.
    """
    require_device(device)
    if device != "cuda":
        raise UserError(f"Waits, recompilations, time and memory are measured on cuda, not on {device}.")
    with tempfile.TemporaryDirectory() as folder, without_drawing(), contextlib.redirect_stdout(None):
        bench = Bench(Path(folder), device)
        with bench.data(device=device) as tiny:
            lines = [_describe_waits(waits(cls, tiny), waits(nnUNetTrainer, tiny))]
            lines.append(_describe_cost(cls, tiny))
        lines.append(_describe_recompilations(recompilations(cls, bench)))
    return lines


def waits(cls: type, tiny: TinyDataset) -> Counter[str]:
    """How often the host waits for the device in a step, by the line of the trainer's own files that it waits in.

    Lines of this package and of nnU-Net count under their class's name.
    """
    step = ready(cls, tiny)
    step()
    found: Counter[str] = Counter()
    with heard_waits(lambda: found.update([calling_place(cls) or f"what all trainers do ({cls.__name__})"])):
        step()
    return found


@contextlib.contextmanager
def heard_waits(tell: Callable[[], object]) -> Iterator[None]:
    """Inside, ``tell`` is called wherever the host waits for a GPU, from within the call that waits."""

    def hear(message: Warning | str, *others: Any, **more: Any) -> None:
        if "synchroniz" in str(message):
            tell()

    on_gpu = torch.cuda.is_available()
    before = torch.cuda.get_sync_debug_mode() if on_gpu else 0
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode(before)


def recompilations(cls: type, bench: Bench) -> list[str]:
    """What torch.compile compiles after the first epoch of a training without stages, as FILE:LINE FUNCTION."""
    at_first_end: list[int] = []
    compiled = os.environ.get("nnUNet_compile")
    # PyTorch keeps the last 64 alone.
    clear_compilation_metrics()
    with bench.data(device=bench.device) as tiny:
        os.environ["nnUNet_compile"] = "1"
        try:
            trainer: Any = tiny.trainer(cls, supervised_fraction=0.0)
            end_epoch = trainer.on_epoch_end

            def end_and_count() -> None:
                end_epoch()
                at_first_end.append(len(get_compilation_metrics()))

            trainer.on_epoch_end = end_and_count
            trainer.run_training()
        finally:
            os.environ["nnUNet_compile"] = compiled or "0"
    return [f"{m.co_filename}:{m.co_firstlineno} {m.co_name}" for m in get_compilation_metrics()[at_first_end[0] :]]


def ready(cls: type, tiny: TinyDataset, examples: int | None = None) -> Callable[[], Any]:
    """A step of a trainer in stage 2, with a batch at hand; of nnU-Net's own trainer with so many examples."""
    if cls is not nnUNetTrainer:
        trainer = tiny.initialized(cls, supervised_fraction=0.0)
        labeled, unlabeled = tiny.batches(trainer)
        feed(trainer, unlabeled)
        return lambda: trainer.train_step(labeled)
    stock: Any = tiny.trainer(cls)
    stock.initialize()
    stock.set_deep_supervision_enabled(True)
    stock.network.train()
    stock.batch_size = examples or stock.batch_size
    labeled, _ = tiny.batches(stock)
    with torch.no_grad():
        shapes = [tuple(o.shape[2:]) for o in stock.network(labeled["data"].to(stock.device))]
    labeled["target"] = downsample_target(labeled["target"], shapes)
    return lambda: stock.train_step(labeled)


def passes(cls: type, tiny: TinyDataset) -> dict[str, list[Pass]]:
    """The passes of a step, by the name of the network."""
    trainer: Any = tiny.initialized(cls, supervised_fraction=0.0)
    found: dict[str, list[Pass]] = {name: [] for name in networks_of(trainer)}

    def noting(name: str) -> Callable[..., None]:
        return lambda module, inputs, outputs: found[name].append(Pass(len(inputs[0]), torch.is_grad_enabled()))

    for name, network in networks_of(trainer).items():
        bare(network).register_forward_hook(noting(name))
    labeled, unlabeled = tiny.batches(trainer)
    feed(trainer, unlabeled)
    trainer.train_step(labeled)
    return found


def seconds(step: Callable[[], Any]) -> float:
    """The median time of a step on the GPU, in seconds."""
    times = []
    for number in range(_WARM_UP + _TIMED):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= _WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory(step: Callable[[], Any]) -> int:
    """The most that a step allocates on the GPU, in bytes."""
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return int(torch.cuda.max_memory_allocated())


def _describe_waits(mine: Mapping[str, int], stock: Mapping[str, int]) -> str:
    more = sum(mine.values()) - sum(stock.values())
    places = ", ".join(f"{place} ({count})" for place, count in mine.items())
    return f"Waits for the device in a step: {sum(mine.values())}, {more:+d} beside nnU-Net's trainer: {places}"


def _describe_cost(cls: type, tiny: TinyDataset) -> str:
    """Time beside the floor: nnU-Net's steps with as many examples as pass through each network with a gradient."""
    per_network = {name: sum(p.examples for p in found if p.with_gradient) for name, found in passes(cls, tiny).items()}
    floor = sum(seconds(ready(nnUNetTrainer, tiny, examples)) for examples in per_network.values() if examples)
    took, memory = seconds(ready(cls, tiny)), peak_memory(ready(cls, tiny))
    stock = peak_memory(ready(nnUNetTrainer, tiny))
    counts = ", ".join(f"{examples} through {name}" for name, examples in per_network.items() if examples)
    return (
        f"A step on tiny patches takes {1e3 * took:.1f} ms, {took / floor:.2f} times what nnU-Net's take with as many "
        f"learning examples ({counts}); it allocates {memory / 2**20:.1f} MiB at most, nnU-Net's {stock / 2**20:.1f}"
    )


def _describe_recompilations(found: list[str]) -> str:
    return f"Compiled again after the first epoch: {', '.join(found) or 'nothing'}"
