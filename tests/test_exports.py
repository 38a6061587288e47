"""``import partita`` gives the names of the contract, and nothing by surprise."""

from __future__ import annotations

import subprocess
import sys

import partita

CONTRACT = {
    "parallelize", "find_plan", "verify", "split", "ModelParallel", "autoparallel", "sharding_rule", "Plan", "Cluster",
}  # fmt: skip


def test_the_contract_is_exported() -> None:
    assert set(partita.__all__) >= CONTRACT
    assert list(partita.__all__) == sorted(partita.__all__)


def test_every_exported_name_exists() -> None:
    missing = [name for name in partita.__all__ if not hasattr(partita, name)]
    assert missing == []


def test_the_contract_is_documented() -> None:
    silent = [name for name in partita.__all__ if not (getattr(partita, name).__doc__ or "").strip()]
    assert silent == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    try:
        partita.paralellize  # noqa: B018
    except AttributeError as error:
        assert "paralellize" in str(error)
    else:
        raise AssertionError("expected AttributeError")


def test_plans_and_clusters_open_without_torch() -> None:
    code = (
        "import sys, partita; from partita import plan_file, cluster_file; cluster_file.describe('2x8xH100'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
