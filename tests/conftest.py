"""Options, environment and fixtures of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from made_up_results import Results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.runtime.cpu import own_cores
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="the whole matrix, and faults more often")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --thorough, a part of the tests."""
    left_out = [] if config.getoption("thorough") else [i for i in items if i.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_configure() -> None:
    # More threads than cores this process may use would wait for each other.
    torch.set_num_threads(min(2, torch.get_num_threads(), len(own_cores())))


@pytest.fixture(autouse=True)
def _nnunet_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("nnUNet_compile", "0")
    # Drawing takes longer than training a tiny network; test_progress_png_shows_the_terms draws for real.
    monkeypatch.setattr("nnunet_ssl.training.logger.TermLogger.plot_progress_png", lambda self, folder: None)
    stock_logger = "nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png"
    monkeypatch.setattr(stock_logger, lambda self, folder: None)


@pytest.fixture
def often(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often to try something: the first number usually, the second with --thorough."""
    return lambda usually, thoroughly: thoroughly if request.config.getoption("thorough") else usually


@pytest.fixture
def tiny(tmp_path: Path) -> TinyDataset:
    return TinyDataset(tmp_path, PATCHES["2d"])


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    """Traces of a network serve every other one with the same code, with the first one's hooks."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path)


@pytest.fixture(params=TRAINERS, ids=lambda t: t.__name__.removeprefix("nnUNetTrainer"))
def trainer_class(request: pytest.FixtureRequest) -> type[nnUNetTrainer]:
    return request.param
