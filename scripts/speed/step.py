#!/usr/bin/env python
"""What training costs: every step beside the passes it cannot do without, every piece beside the usual way.

Every figure is a ratio of things measured in turns in one run, on noise. Parts:

    steps      seconds per step, samples per second, and the ratio to the floor: nnU-Net's own step on the passes that
               the method needs, with the same networks and batch
    memory     peak memory over the stock trainer's
    waiting    share of the time in which no batch is ready, with real loaders and nnU-Net's augmentation
    usual      elastic transforms, entropy thresholds, uncertainty and double views as the field usually does them
    patch      how a step grows with the volume of the patch
    classes    how it grows with the number of labels
    list       start-up of the unlabeled loader with 100 to 100,000 cases
    workers    samples per second of the loaders by their number of workers
    monitor    what looking at a training every epoch adds
    profile    operators that cost more than in the floor, and how often the host waits for a GPU

    python scripts/speed/step.py [--device cuda] [--only steps memory] [--plans FILE 2d]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from growth import growth_with_classes, growth_with_patch
from loading import growth_with_list, loader_speed, share_waiting, start_with_list
from monitoring import monitor_cost
from setups import MEASURED, case_of_plans, cases_on_cpu, small_cases, smallest_cases, use_folders
from steps import compare_memory, compare_steps, peak_memory, profile_steps
from timing import keep_memory
from usual_ways import compare_usual_ways

PARTS = ("steps", "memory", "waiting", "usual", "patch", "classes", "list", "workers", "monitor", "profile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bfloat16", action="store_true", help="on the CPU, train with autocast")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2), help="of the training, in steps and memory")
    parser.add_argument("--repetitions", type=int, default=9, help="turns")
    parser.add_argument("--smoke", action="store_true", help="smallest cases and one turn: does everything work")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--trainers", nargs="+", choices=MEASURED, default=list(MEASURED), help="which to measure")
    parser.add_argument(
        "--cases", type=int, nargs="+", help="which of the cases, from 0: 2D, 3D, anisotropic 3D, then those of --plans"
    )
    parser.add_argument(
        "--plans",
        nargs=2,
        action="append",
        default=[],
        metavar=("FILE", "CONFIGURATION"),
        help="a case of nnU-Net's own; dataset.json lies beside the file",
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="of the loaders")
    parser.add_argument("--sides", type=int, nargs="+", default=[24, 32, 48, 64, 96], help="of patches")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 5, 10, 30, 100], help="numbers of labels")
    parser.add_argument("--list-lengths", type=int, nargs="+", default=[100, 1000, 10000, 100000])
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "TRAINER"), help=argparse.SUPPRESS)
    parser.add_argument("--list-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, names, turns = torch.device(arguments.device), arguments.trainers, arguments.repetitions
    side = 128
    if arguments.smoke:
        turns, side = 1, 32
        arguments.sides, arguments.classes = [16, 24], [2, 5]
        arguments.workers, arguments.list_lengths = [1], [100, 1000]
    every = [
        *(smallest_cases() if arguments.smoke else cases_on_cpu()),
        *(case_of_plans(Path(file), name) for file, name in arguments.plans),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        use_folders(folder)
        if arguments.memory_of:
            number, trainer = arguments.memory_of
            print(peak_memory(every[int(number)], trainer, device, arguments.bfloat16, arguments.stage))
            return
        if arguments.list_of:
            print(*start_with_list(arguments.list_of, folder))
            return
        keep_memory()
        numbers = range(len(every)) if arguments.cases is None else arguments.cases
        cases = [every[i] for i in numbers]
        script, bfloat16 = Path(__file__), arguments.bfloat16
        again = [f"--{name}" for name in ("smoke", "bfloat16") if getattr(arguments, name)]
        again += ["--device", arguments.device, "--stage", str(arguments.stage)]
        again += [word for pair in arguments.plans for word in ("--plans", *pair)]
        by_number = dict(zip(numbers, cases))
        # Loaders are measured with networks that leave them little time, unless plans were asked for.
        quick = by_number if arguments.smoke or arguments.plans else dict(enumerate(small_cases(), len(every)))
        batches = 4 if arguments.smoke else 60
        parts = {
            "steps": lambda: compare_steps(cases, names, device, turns, bfloat16, arguments.stage),
            "memory": lambda: compare_memory(by_number, names, script, again),
            "waiting": lambda: share_waiting(quick, names, device, folder, max(arguments.workers), batches),
            "usual": lambda: compare_usual_ways(cases, device, turns),
            "patch": lambda: growth_with_patch(arguments.sides, names, device, turns, bfloat16),
            "classes": lambda: growth_with_classes(arguments.classes, side, names, device, turns, bfloat16),
            "list": lambda: growth_with_list(arguments.list_lengths, script),
            "workers": lambda: loader_speed(by_number, device, folder, arguments.workers, batches),
            "monitor": lambda: monitor_cost(cases, names, device, turns),
            "profile": lambda: profile_steps(cases, names, device, bfloat16),
        }
        for part in arguments.only:
            print(f"\n{part}\n", flush=True)
            parts[part]()


if __name__ == "__main__":
    main()
