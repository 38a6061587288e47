"""What tests share: where the zoo is, one intra-op thread, a cache of their own, no deadline for drawn examples."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings
from places import zoo_dir

settings.register_profile("partita", deadline=None)  # machines are shared: how long an example takes says nothing
settings.load_profile("partita")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("PARTITA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Each test draws the same random numbers, whichever tests ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip by name what this machine cannot run, and what runs only when asked for."""
    asked = "distributed_full" in str(config.getoption("-m"))
    no_zoo = None if (zoo_dir() / "zoo.py").is_file() else f"no model zoo at {zoo_dir()} (PARTITA_ZOO names another)"
    no_cuda = _no_cuda() if any(item.get_closest_marker("cuda") for item in items) else None
    for item in items:
        if not asked and item.get_closest_marker("distributed_full"):
            item.add_marker(pytest.mark.skip(reason="the whole product takes an hour: pytest -m distributed_full"))
        if no_zoo and item.get_closest_marker("zoo"):
            item.add_marker(pytest.mark.skip(reason=no_zoo))
        if no_cuda and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=no_cuda))


def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU; torch.cuda.is_available() is False here"
