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
print([op.target for op in found.graph.ops], bool(found.live))
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


def test_what_forward_itself_compiles_is_traced_as_plain_python(tmp_path: Path) -> None:
    assert run(COMPILES, tmp_path) == "['aten.linear.default', 'aten.relu.default', 'aten.add.Tensor'] False"
