"""Clusters: descriptions without hardware, files, and this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita import cluster_file
from partita.cluster import Cluster, Device, Link
from partita.cluster_presets import ALIASES, PRESETS
from partita.errors import ClusterError, UsageError
from partita.measure import detect, machine
from partita.measure.detect import local_cluster

FIGURES = {"flops": 8e10, "bandwidth": 2e10, "all_bandwidth": 3e10, "overhead": 2e-6, "handover": 2e-5}


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores, 10 GiB and no GPU, nothing measured."""
    monkeypatch.setattr(machine, "usable_cores", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * 2**30)
    monkeypatch.setattr(detect, "_num_cuda", lambda: 0)
    monkeypatch.setattr(detect, "_figures", lambda *_: FIGURES)


def names(cluster: Cluster) -> list[str]:
    return [d.name for d in cluster.devices]


# Descriptions


def test_one_node_is_called_as_torch_calls_it() -> None:
    cluster = Cluster.parse("8xH100")
    assert names(cluster) == [f"cuda:{i}" for i in range(8)]
    assert cluster.devices[0].memory_bytes == 80 * 10**9
    assert cluster.link("cuda:0", "cuda:7").bandwidth == PRESETS["H100"].fabric


def test_two_nodes_are_joined_by_the_network() -> None:
    cluster = Cluster.parse("2x8xH100")
    assert len(cluster.devices) == 16
    assert names(cluster)[7:9] == ["node0/cuda:7", "node1/cuda:0"]
    assert [d.node for d in cluster.devices] == [0] * 8 + [1] * 8
    assert cluster.link("node1/cuda:0", "node1/cuda:1").bandwidth == PRESETS["H100"].fabric
    assert cluster.link("node0/cuda:0", "node1/cuda:0").bandwidth == PRESETS["H100"].network


def test_unequal_nodes_meet_at_the_slower_network() -> None:
    cluster = Cluster.parse("8xA100-80GB + 16xV100-16GB + 4xA100-40GB")
    assert len(cluster.devices) == 28
    assert {d.kind for d in cluster.devices} == {"A100-80GB", "V100-16GB", "A100-40GB"}
    slow, fast = PRESETS["V100-16GB"].network, PRESETS["A100-80GB"].network
    assert cluster.link("node0/cuda:0", "node1/cuda:0").bandwidth == slow
    assert cluster.link("node2/cuda:0", "node0/cuda:0").bandwidth == fast
    assert cluster.link("node2/cuda:0", "node2/cuda:1").bandwidth == PRESETS["A100-40GB"].fabric


def test_node_one_is_not_node_ten() -> None:
    cluster = Cluster.parse("11x1xH100")
    assert cluster.link("node1/cuda:0", "node10/cuda:0").bandwidth == PRESETS["H100"].network


@pytest.mark.parametrize("spec", ["4xcpu ", "4 x CPU", "4xh100", "h100"])
def test_kinds_are_read_in_any_case(spec: str, four_cores: None) -> None:
    assert len(Cluster.parse(spec).devices) in (1, 4)


def test_a_memory_size_in_the_kind_replaces_the_preset() -> None:
    assert Cluster.parse("2xH100-96GB").devices[0].memory_bytes == 96 * 10**9
    assert Cluster.parse("2xA100").devices[0].kind == "A100-80GB"


def test_a_thousand_devices_open_at_once() -> None:
    cluster = Cluster.parse("125x8xH100")
    assert len(cluster.devices) == 1000
    assert cluster.link("node3/cuda:1", "node99/cuda:7").bandwidth == PRESETS["H100"].network


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("8xH10", "no figures for a device called 'H10' in the cluster '8xH10'; did you mean 'H100'?"),
        ("8xQuantum", "no figures for a device called 'Quantum' in the cluster '8xQuantum'; known: CPU, T4"),
        ("0xH100", "'0xH100' in the cluster '0xH100' has no devices; counts start at 1"),
        ("8xH100 +", "cannot read '' in the cluster '8xH100 +'; write for example '8xH100'"),
        ("8*H100", "cannot read '8*H100'"),
    ],
)
def test_a_description_that_describes_nothing_says_so(spec: str, text: str) -> None:
    with pytest.raises(ClusterError) as caught:
        Cluster.parse(spec)
    assert text in str(caught.value)


def test_every_preset_has_its_source_and_plausible_figures() -> None:
    for name, preset in PRESETS.items():
        assert len(preset.source) > 40, name
        assert preset.prefix in ("cpu", "cuda")
        assert 0 < preset.network <= preset.fabric < preset.memory_bandwidth, name
    assert set(ALIASES.values()) <= set(PRESETS)


# Links


def test_the_most_specific_link_wins_and_later_over_earlier() -> None:
    device = Device("a", "a", 1, 1.0, 1.0)
    links = (Link("a", "b", 3.0, 0), Link("*", "*", 1.0, 0), Link("b", "*", 2.0, 0), Link("*", "*", 1.5, 0))
    cluster = Cluster((device,), links)
    assert cluster.link("b", "a").bandwidth == 3.0
    assert cluster.link("c", "b").bandwidth == 2.0
    assert cluster.link("c", "d").bandwidth == 1.5


def test_a_transfer_costs_latency_plus_bytes_over_bandwidth() -> None:
    cluster = Cluster((), (Link("*", "*", 100.0, 0.5),))
    assert cluster.transfer_seconds("a", "b", 200) == 2.5
    assert cluster.transfer_seconds("a", "a", 200) == 0.0


# Files

amounts = st.floats(1e-3, 1e18, allow_nan=False)
clusters = st.builds(
    Cluster,
    devices=st.lists(
        st.builds(
            Device,
            name=st.from_regex(r"(cpu|cuda|node1/cuda):[0-9]{1,3}", fullmatch=True),
            kind=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=9),
            memory_bytes=st.one_of(st.integers(1, 2**45), st.integers(1, 2**20).map(lambda n: n * 2**20)),
            flops=amounts,
            memory_bandwidth=amounts,
            cores=st.lists(st.integers(0, 200), max_size=4).map(tuple),
            overhead_seconds=st.floats(0, 1),
            node=st.integers(0, 3),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda d: d.name,
    ).map(tuple),
    links=st.lists(
        st.builds(
            Link, source=st.sampled_from(["*", "cpu:0", "node0/*"]), target=st.just("*"), bandwidth=amounts,
            latency_seconds=st.floats(0, 1),
        ),
        max_size=3,
    ).map(tuple),
)  # fmt: skip


@given(clusters)
def test_a_cluster_written_reads_back_equal(cluster: Cluster) -> None:
    assert cluster_file.loads(cluster_file.dumps(cluster)) == cluster


def test_described_clusters_survive_their_file(tmp_path: Path) -> None:
    cluster = Cluster.parse("2x4xA100-40GB + 8xV100-32GB")
    cluster.save(tmp_path / "c.yaml")
    assert Cluster.load(tmp_path / "c.yaml") == cluster == Cluster.parse(str(tmp_path / "c.yaml"))


GOOD = """\
partita_cluster: 1
devices:
  - {name: cpu:0, memory: 4GiB, flops: 60 Gflop/s, memory_bandwidth: 10 GB/s, cores: [0, 1]}
  - {name: cuda:0, kind: T4, memory: 15GiB, flops: 8.1T, memory_bandwidth: 320GB/s, overhead: 6us, node: 0}
links:
  - {between: ['*', '*'], bandwidth: 12e9, latency: 10us}
"""


def test_a_cluster_written_by_hand_is_read() -> None:
    cluster = cluster_file.loads(GOOD)
    assert cluster.devices[0] == Device("cpu:0", "cpu:0", 4 * 2**30, 60e9, 10e9, (0, 1))
    assert cluster.devices[1].flops == 8.1e12
    assert cluster.links == (Link("*", "*", 12e9, 10e-6),)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("flops: 60", "flop: 60", "line 3: devices[0].flop: unknown key; did you mean 'flops'?"),
        ("4GiB", "4 apples", "line 3: devices[0].memory: '4 apples' is not an amount of memory"),
        ("60 Gflop/s", "fast", "line 3: devices[0].flops: 'fast' is not a rate; write for example '60 Gflop/s'"),
        ("60 Gflop/s", "0", "devices[0].flops: must be more than 0 and finite, found '0'"),
        ("10us}", "soon}", "line 6: links[0].latency: 'soon' is not a time; write for example '20us'"),
        ("cuda:0", "cpu:0", "line 4: devices[1].name: a second device called 'cpu:0'; names must differ"),
        ("partita_cluster: 1", "partita_cluster: 7", "this is a cluster file of version '7'; this partita reads 1"),
        ("['*', '*']", "['*']", "line 6: links[0].between: expected"),
        ("[0, 1]", "[a]", "line 3: devices[0].cores: expected a list of whole numbers, found a list"),
    ],
)
def test_a_mistake_in_a_cluster_file_is_named_with_its_line(old: str, new: str, text: str) -> None:
    with pytest.raises(ClusterError) as caught:
        cluster_file.loads(GOOD.replace(old, new, 1), "'c.yaml'")
    assert text in str(caught.value)


def test_no_devices_and_no_mapping_are_refused() -> None:
    with pytest.raises(ClusterError, match="a cluster needs at least one device"):
        cluster_file.loads("partita_cluster: 1\ndevices: []\n")
    with pytest.raises(ClusterError, match="is not a cluster"):
        cluster_file.loads("hello")


# This machine


@pytest.mark.parametrize(
    "spec", [2, "2", "cpu:0,cpu:1", ["cpu", "cpu"], ("cpu:0", "cpu"), "cpu, cpu", ["CPU", "cpu:1"]]
)
def test_two_devices_can_be_asked_for_in_many_ways(spec: object, four_cores: None) -> None:
    cluster = Cluster.parse(spec)  # type: ignore[arg-type]
    assert names(cluster) == ["cpu:0", "cpu:1"]
    assert [d.cores for d in cluster.devices] == [(0, 1), (2, 3)]


def test_a_count_of_cpus_is_this_machine_where_something_runs_and_a_description_where_it_is_planned(
    four_cores: None,
) -> None:
    assert local_cluster("2xCPU") == local_cluster(2)
    assert Cluster.parse("2xCPU").devices[0].flops == PRESETS["CPU"].flops


def test_cores_are_disjoint_and_speed_follows_them(four_cores: None) -> None:
    one, two, three = local_cluster(3).devices
    assert sorted(one.cores + two.cores + three.cores) == [0, 1, 2, 3]
    assert three.flops == 2 * one.flops == 1.6e11
    assert one.memory_bandwidth == 7.5e9  # four cores together reach 30 GB/s


def test_more_devices_than_cores_share_them_and_their_speed(four_cores: None) -> None:
    devices = local_cluster(8).devices
    assert [d.cores for d in devices] == [(0,), (1,), (2,), (3,)] * 2
    assert devices[0].flops == 4e10


def test_free_memory_is_shared_equally(four_cores: None) -> None:
    assert [d.memory_bytes for d in local_cluster(3).devices] == [3072 * 2**20] * 3


def test_auto_takes_every_core_group(four_cores: None) -> None:
    assert names(local_cluster("auto")) == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]


def test_memory_limits_all_or_some(four_cores: None) -> None:
    assert [d.memory_bytes for d in local_cluster(2, memory="2GiB").devices] == [2 * 2**30] * 2
    assert [d.memory_bytes for d in local_cluster(2, memory={"cpu:1": "1MiB"}).devices] == [4608 * 2**20, 2**20]
    assert Cluster.parse("2xH100", memory="1GiB").devices[1].memory_bytes == 2**30


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        ({"cpu:2": "1GiB"}, "memory= names a device 'cpu:2' that is not used; did you mean 'cpu:"),
        ("lots", "'lots' is not an amount of memory"),
        ("0", "memory= gives cpu:0 nothing"),
    ],
)
def test_a_memory_limit_that_cannot_be_meant_is_refused(memory: object, text: str, four_cores: None) -> None:
    with pytest.raises(UsageError) as caught:
        local_cluster(2, memory=memory)  # type: ignore[arg-type]
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("cuda:0", "there is no device 'cuda:0'; this machine has 4 CPU cores and no CUDA GPU"),
        (["cpu:0", "cpu:32"], "there is no device 'cpu:32'; this machine has 4 CPU cores"),
        (["cpu:0", "cpu:0"], "device 'cpu:0' is named twice"),
        ("tpu:1,cpu", "there is no device 'tpu:1'; did you mean 'cpu'?"),
        (0, "devices=0 leaves nothing to run on"),
        (-1, "devices=-1 leaves nothing to run on"),
        ([], "devices=[] leaves nothing to run on"),
        (True, "devices=True names no devices"),
        (2.5, "devices=2.5 names no devices"),
        (["cpu:x"], "there is no device 'cpu:x'"),
        (33, "there is no device 'cpu:32'"),
    ],
)
def test_devices_that_are_not_here_are_named_with_what_is(spec: object, text: str, four_cores: None) -> None:
    with pytest.raises(ClusterError) as caught:
        local_cluster(spec)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_missing_gpus_point_to_planning_without_them(four_cores: None) -> None:
    with pytest.raises(ClusterError, match=r"describe them: devices='2xH100' in find_plan"):
        local_cluster("cuda:0,cuda:1")


def test_detection_measures_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    first = Cluster.detect()
    assert [p.name for p in tmp_path.iterdir()] == ["machine.json"]
    assert all(d.flops > 1e8 and d.memory_bandwidth > 1e8 and d.memory_bytes > 0 for d in first.devices)

    def again() -> dict[str, float]:
        raise AssertionError("measured twice")

    monkeypatch.setattr(detect.speed, "core_speed", again)
    second = Cluster.detect()
    assert [(d.name, d.flops, d.cores) for d in second.devices] == [(d.name, d.flops, d.cores) for d in first.devices]


def test_measuring_leaves_the_callers_threads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    before = torch.get_num_threads()
    Cluster.detect(refresh=True)
    assert torch.get_num_threads() == before


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(detect.speed, "core_speed", lambda: {k: FIGURES[k] for k in ("flops", "bandwidth", "overhead")})
    assert Cluster.detect().devices


def test_cores_and_memory_are_what_the_system_grants() -> None:
    cores = machine.usable_cores()
    if hasattr(os, "sched_getaffinity"):
        assert set(cores) <= os.sched_getaffinity(0)
    assert 0 < machine.available_memory() < 2**50


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 2), ("max 100000", 1 << 20), ("50000 100000", 1)])
def test_a_cgroup_quota_is_whole_cores_rounded_up(text: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cgroup", lambda name: text)
    assert machine.cpu_quota() == cores


@pytest.mark.cuda
def test_gpus_are_found_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    cluster = local_cluster(["cpu", "cuda:0"])
    assert names(cluster) == ["cpu:0", "cuda:0"]
    assert cluster.device("cuda:0").flops > 10 * cluster.device("cpu:0").flops
    assert cluster.link("cpu:0", "cuda:0").bandwidth > 1e9
