"""Benchmarks on one device beside its host: the plans they try, and what they say where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import benchmarks.prediction.run
import benchmarks.regret.run
import benchmarks.rivals.run
from benchmarks.devices import cluster_of
from benchmarks.prediction.study import Setting
from partita.predict import predict


@pytest.mark.parametrize("program", [benchmarks.prediction.run, benchmarks.regret.run, benchmarks.rivals.run])
def test_without_a_gpu_each_says_that_it_skips(program, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert program.main(["--device", "cuda"]) == 0
    assert "skipped: " in capsys.readouterr().err


def test_plans_of_one_device_give_the_same_gradients_and_those_that_recompute_need_less():
    cluster = cluster_of("cpu:0")
    setting = Setting.make("tiny", cluster, timed=False)
    plans = setting.plans(cluster, few=True)
    needs, found = {}, {}
    for title, plan in plans.items():
        needs[title] = dict(predict(setting.captured.graph, plan, cluster, optimizer="none").memory)["cpu:0"]
        parallel = setting.run(cluster, plan)
        setting.step(parallel)
        parallel.close()
        found[title] = [p.grad.clone() for p in setting.model.parameters() if p.grad is not None]
    plain, *others = found.values()
    assert len(plain) == len(list(setting.model.parameters()))
    for each in others:
        torch.testing.assert_close(each, plain, rtol=1e-4, atol=1e-6)
    assert (
        needs["recomputing all, 4 microbatches"] < needs["all kept, 4 microbatches"] < needs["all kept, 1 microbatch"]
    )
