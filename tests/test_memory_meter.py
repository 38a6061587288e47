"""The memory meter counts storages, once each, from birth to death, on whatever thread they die."""

from __future__ import annotations

import gc
import threading

import torch
from torch import nn

from partita.runtime.meter import MemoryMeter, storage_bytes

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.zeros(kib * 256)


def test_live_is_what_is_alive_and_peak_is_the_most_there_was() -> None:
    with MemoryMeter() as meter:
        a = floats(4)
        b = a + 1
        assert meter.live_bytes == 8 * KIB
        del a
        assert meter.live_bytes == 4 * KIB
        del b
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 8 * KIB


def test_views_and_in_place_results_share_a_storage_that_counts_once() -> None:
    with MemoryMeter() as meter:
        a = floats(4)
        view = a.view(16, -1)[3:5].t()
        a.add_(1)
        assert meter.live_bytes == 4 * KIB
        del a
        assert meter.live_bytes == 4 * KIB, "the view keeps the storage alive"
        del view
        assert meter.live_bytes == 0


def test_tensors_of_others_do_not_count_unless_held() -> None:
    other = floats(4)
    with MemoryMeter() as meter:
        other.mul_(2)
        part = other[:10]
        assert meter.live_bytes == 0
        meter.hold([other, {"part": part}])
        assert meter.live_bytes == 4 * KIB
    del other, part
    assert meter.live_bytes == 0


def test_what_backward_makes_and_frees_is_seen() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    parameters = 2 * 64 * 64 * 4
    x = torch.randn(32, 64)
    activation = 32 * 64 * 4
    with MemoryMeter() as meter:
        meter.hold(list(model.parameters()))
        y = model(x).sum()
        assert meter.live_bytes >= parameters + activation
        y.backward()
        del y
        gc.collect()
        assert meter.live_bytes == 2 * parameters, "parameters and gradients stay, activations are gone"
    assert meter.peak_bytes > 2 * parameters


def test_a_storage_that_dies_on_another_thread_is_taken_off_its_makers_meter() -> None:
    box: list[torch.Tensor] = []
    with MemoryMeter() as meter:
        box.append(floats(4))
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert meter.live_bytes == 0 and meter.peak_bytes == 4 * KIB


def test_each_thread_has_its_own_count() -> None:
    meters = [MemoryMeter(), MemoryMeter()]
    kept: list[torch.Tensor] = []

    def work(index: int) -> None:
        with meters[index]:
            for _ in range(100):
                floats(1)
            kept.append(floats(4 * (index + 1)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [m.live_bytes for m in meters] == [4 * KIB, 8 * KIB]
    assert [m.peak_bytes for m in meters] == [4 * KIB, 8 * KIB]


def test_a_resized_storage_counts_at_its_new_size() -> None:
    with MemoryMeter() as meter:
        a = floats(1)
        a.resize_(8 * 256)
        assert meter.live_bytes == 8 * KIB


def test_reset_peak_starts_from_what_is_alive() -> None:
    with MemoryMeter() as meter:
        a = floats(4)
        floats(16)
        assert meter.peak_bytes == 20 * KIB
        meter.reset_peak()
        assert meter.peak_bytes == meter.live_bytes == 4 * KIB
        del a


def test_storage_bytes_counts_shared_storage_once() -> None:
    a = floats(4)
    assert storage_bytes([a, a[3:], floats(2)]) == 6 * KIB
