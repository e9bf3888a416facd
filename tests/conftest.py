"""Options, environment and fixtures of the tests.

Imports that take seconds are in the functions: the process that hands the tests out to others needs none of them.
"""

from __future__ import annotations

import multiprocessing.spawn
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from preloaded import preloaded

if TYPE_CHECKING:
    from made_up_results import Results

    from nnunet_ssl.testing.tiny import TinyDataset

# Of a test that runs over trainers, --quick takes this one; where it is not among them, the first.
QUICK_TRAINER = "nnUNetTrainerSemiTC"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="the whole matrix, and faults more often")
    parser.addoption("--quick", action="store_true", help="what takes little time, with one trainer")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --thorough, a part of the tests; with --quick, a smaller one. Slow ones come first: none is the last."""
    left_out = [] if config.getoption("thorough") else [i for i in items if i.get_closest_marker("thorough")]
    if config.getoption("quick"):
        left_out += [item for item in items if item.get_closest_marker("slow")]
        left_out += _of_further_trainers([item for item in items if item not in left_out])
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    # After some backward passes, as of compiled networks, PyTorch refuses those of copies of the process.
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("forks", "slow")])


def _of_further_trainers(items: list[pytest.Item]) -> list[pytest.Item]:
    """What is left when one trainer runs every test."""
    by_test: dict[tuple[object, ...], dict[str, list[pytest.Item]]] = {}
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        names = {name: getattr(value, "__name__", value) for name, value in parameters.items()}
        trainers = [name for name, value in names.items() if str(value).startswith("nnUNetTrainer")]
        if len(trainers) == 1:
            of_test = by_test.setdefault((item.path, item.originalname), {})
            of_test.setdefault(names[trainers[0]], []).append(item)
    further = []
    for of_test in by_test.values():
        chosen = QUICK_TRAINER if QUICK_TRAINER in of_test else next(iter(of_test))
        further += [item for name, of_trainer in of_test.items() if name != chosen for item in of_trainer]
    return further


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trainer_class" in metafunc.fixturenames:
        from nnunet_ssl.methods import TRAINERS

        metafunc.parametrize("trainer_class", TRAINERS, ids=lambda t: t.__name__.removeprefix("nnUNetTrainer"))


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None):
        import torch

        from nnunet_ssl.runtime.cpu import own_cores

        # More threads than cores this process may use would wait for each other.
        torch.set_num_threads(min(2, torch.get_num_threads(), len(own_cores())))


@pytest.fixture(scope="session", autouse=True)
def executables() -> Iterator[Path]:
    """Python and the commands, with everything imported; the workers of this process come from there, too."""
    if not hasattr(os, "pidfd_open"):
        yield Path(sys.executable).parent
        return
    own = multiprocessing.spawn.get_executable()
    with preloaded(nnUNet_def_n_proc="1") as folder:
        multiprocessing.set_executable(str(folder / "python"))
        yield folder
        multiprocessing.set_executable(own)


@pytest.fixture(autouse=True)
def _nnunet_environment(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lighter import replacements

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("nnUNet_compile", "0")
    # Drawing takes longer than training a tiny network; test_progress_png_shows_the_terms draws for real.
    for logger in ("nnunet_ssl.training.logger.TermLogger", "nnunetv2.training.logging.nnunet_logger.LocalLogger"):
        monkeypatch.setattr(f"{logger}.plot_progress_png", lambda self, folder: None)
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr("nnunet_ssl.training.monitor._draw", lambda file, *content: Path(file).touch())
    for owner, name, value in replacements():
        monkeypatch.setattr(owner, name, value)


@pytest.fixture
def often(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often to try something: the first number usually, the second with --thorough."""
    return lambda usually, thoroughly: thoroughly if request.config.getoption("thorough") else usually


@pytest.fixture
def tiny(tmp_path: Path) -> TinyDataset:
    from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

    return TinyDataset(tmp_path, PATCHES["2d"])


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    """Traces of a network serve every other one with the same code, with the first one's hooks."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def results(tmp_path: Path) -> Results:
    from made_up_results import Results

    return Results(tmp_path)
