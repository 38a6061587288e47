"""Clusters on paper: links by name, 16-bit peaks, and as many devices as one likes."""

from __future__ import annotations

import pytest

from partita import cluster_file
from partita.cluster import Cluster
from partita.cluster_presets import FABRICS, NETWORKS, PRESETS
from partita.cost.roofline import Assumptions
from partita.errors import ClusterError
from partita.planners.large.pools import pools


def test_a_description_may_name_its_links() -> None:
    cluster = Cluster.parse("2x8xA100@PCIE4@ETHERNET-25G")
    assert cluster.link("node0/cuda:0", "node0/cuda:1").bandwidth == FABRICS["PCIE4"].bandwidth
    assert cluster.link("node0/cuda:0", "node1/cuda:0").bandwidth == NETWORKS["ETHERNET-25G"].bandwidth == 25e9 / 8


def test_an_unknown_link_is_corrected() -> None:
    with pytest.raises(ClusterError, match="ETHERNET-25G"):
        Cluster.parse("2x8xA100@ETHERNET-26G")


def test_every_gpu_is_faster_in_16_bits_and_says_where_that_is_published() -> None:
    for name, preset in PRESETS.items():
        assert preset.source
        assert name == "CPU" or 3 * preset.flops < preset.half_flops or name == "MI300X" and preset.half_flops
    assert all(link.source for link in (*NETWORKS.values(), *FABRICS.values()))


def test_a_file_keeps_the_16_bit_peak() -> None:
    cluster = Cluster.parse("2x2xH100")
    assert cluster_file.loads(cluster_file.dumps(cluster)) == cluster


def test_pools_are_kinds_with_their_nodes_and_links() -> None:
    found = pools(Cluster.parse("8xA100-80GB + 2x4xV100-16GB"), Assumptions(links=0.5))
    assert [(p.device.kind, p.count, p.per_node) for p in found] == [("A100-80GB", 8, 8), ("V100-16GB", 8, 4)]
    assert found[0].inside.bandwidth == 0.5 * PRESETS["A100-80GB"].fabric
    assert found[0].across.bandwidth == found[1].across.bandwidth == 0.5 * PRESETS["V100-16GB"].network


def test_sixteen_thousand_devices_are_a_few_objects() -> None:
    cluster = Cluster.parse("2048x8xH100")
    (pool,) = pools(cluster, Assumptions())
    assert (pool.count, pool.per_node) == (16384, 8)
