"""What a first use does not wait for: modules that take seconds to import and are of no use to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

IMPORTS = """
import torch, sys
before = set(sys.modules)
import partita.api
heavy = {'torch._dynamo', 'torch._inductor', 'sympy', 'torch.distributed.tensor', 'networkx', 'scipy', 'pandas', 'rich',
         'matplotlib', 'transformers'}
print(sorted(heavy & (set(sys.modules) - before)))
"""

FIRST = """
import sys, torch, partita
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.drop = nn.Dropout(0.1)
    def forward(self, x):
        return x + self.drop(self.b(nn.functional.gelu(self.a(self.norm(x)))))
model = nn.Sequential(*(Model() for _ in range(4)))
x = torch.randn(512, 64)
parallel = partita.parallelize(model, (x,), devices=['cpu', 'cpu'], loss_fn=nn.functional.mse_loss)
parallel.train_step(x, x)
print(sorted({'torch._dynamo', 'torch._inductor', 'networkx'} & set(sys.modules)))
import torch._dynamo.config  # the real one, afterwards
assert torch._dynamo.__file__ and torch._dynamo.config.__file__ and torch._dynamo.source.__file__
f = torch.compile(lambda x: torch.nn.functional.gelu(x) * 2, backend='eager', fullgraph=True)
assert torch.equal(f(x), torch.nn.functional.gelu(x) * 2)
kept = [f for f in vars(torch._refs).values() if getattr(getattr(f, '__wrapped__', None), '__dynamo_disable', None)]
assert not any(f.__wrapped__.__dict__['__dynamo_disable'] is f.__wrapped__ for f in kept)
"""

COMPILES = """
import sys, torch
from torch import nn
from partita.capture import capture
class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return torch.compile(lambda y: torch.relu(y) + 1, backend='eager')(self.a(x))
found = capture(Late(), (torch.randn(4, 8),))
print([op.target for op in found.graph.ops], bool(found.live), 'torch._dynamo' in sys.modules)
"""


def run(code: str, folder: Path) -> str:
    """The last line that a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PARTITA_CACHE": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_what_parallelize_imports_is_light(tmp_path: Path) -> None:
    assert run(IMPORTS, tmp_path) == "[]"


def test_no_compiler_is_imported_up_to_the_first_step_and_it_works_afterwards(tmp_path: Path) -> None:
    assert run(FIRST, tmp_path) == "[]"


def test_what_forward_itself_compiles_is_traced_as_plain_python(tmp_path: Path) -> None:
    targets = "['aten.linear.default', 'aten.relu.default', 'aten.add.Tensor']"
    assert run(COMPILES, tmp_path) == f"{targets} False True"
