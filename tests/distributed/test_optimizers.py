"""An optimizer on ranks trains what it would train in one process, or is refused before its first step."""

from __future__ import annotations

import json

from tests.distributed.spawn import run_ranks

SAME = ("LBFGS/replicas", "Adafactor/replicas", "Muon/stages", "Lamb/zero1", "RMSprop/tensor", "RMSprop/stages")
REFUSED = {
    "LBFGS/stages": "looks at all parameters at once", "LBFGS/zero1": "looks at all parameters at once",
    "LBFGS/tensor": "looks at all parameters at once", "Adafactor/tensor": "looks at each parameter as a whole",
    "Muon/tensor": "looks at each parameter as a whole", "Lamb/tensor": "looks at each parameter as a whole",
}  # fmt: skip


def test_an_optimizer_trains_as_in_one_process_or_is_refused_on_every_rank() -> None:
    ended = run_ranks(2, ["-m", "tests.distributed.optimizers", *SAME, *REFUSED], timeout=120)
    assert [e.code for e in ended] == [0, 0], "\n".join(e.err[-2000:] for e in ended)
    for rank in ended:
        found = {each["case"]: each for each in (json.loads(line) for line in rank.out.splitlines() if line[0] == "{")}
        assert list(found) == [*SAME, *REFUSED]
        for case in SAME:
            assert found[case]["refused"] == "" and found[case]["off"] < 1e-4, found[case]
        for case, words in REFUSED.items():
            assert words in found[case]["refused"], found[case]
