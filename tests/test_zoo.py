"""Every model of the zoo, divided: outputs, named gradients and buffers are the unsplit model's on fresh inputs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from places import ROOT
from test_capture_zoo import NAMES, zoo  # noqa: F401

sys.path.insert(0, str(ROOT))

from benchmarks.same_numbers.run import comparisons


@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_a_divided_real_model_has_the_unsplit_models_numbers(zoo: Any, name: str) -> None:  # noqa: F811
    for case, captured, found, _ in comparisons(name, zoo[name].build):
        assert found.ok, (name, case, captured.live, str(found))
