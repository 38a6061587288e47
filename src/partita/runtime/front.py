"""The two other ways in: a context that divides whatever is called inside it, and a module in DistributedDataParallel's
shape that captures at its first call."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from partita.runtime.module import ParallelModule
from partita.torch_compat import not_compiled

Divide = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ParallelModule]


@contextlib.contextmanager
def dividing(divide: Divide) -> Iterator[None]:
    """While open, the outermost module called on this thread runs divided (``divide`` makes it so, once a module)."""
    made: weakref.WeakKeyDictionary[nn.Module, ParallelModule] = weakref.WeakKeyDictionary()
    here = threading.get_ident()
    inside = False
    plain = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        busy = inside or threading.get_ident() != here or isinstance(module, ParallelModule)
        if busy or next(module.parameters(), None) is None:
            return plain(module, *args, **kwargs)
        inside = True
        try:
            parallel = made.get(module)
            if parallel is None:
                parallel = made[module] = divide(module, args, kwargs)
            return parallel.forward(*args, **kwargs)
        finally:
            inside = False

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = plain  # type: ignore[method-assign]
        for parallel in made.values():
            parallel.close()


class LazyParallel(nn.Module):
    """A ParallelModule made at the first call, when the inputs are known; its parameters are the user's throughout."""

    def __init__(self, module: nn.Module, divide: Divide) -> None:
        super().__init__()
        self.module = module
        self._divide = divide
        self._made: list[ParallelModule] = []

    @property
    def parallel(self) -> ParallelModule | None:
        """The divided module; None before the first call."""
        return self._made[0] if self._made else None

    @not_compiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._made:
            self._made.append(self._divide(self.module, args, kwargs))
        return self._made[0].forward(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Under the model's own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)


def device_names(device_ids: Sequence[int | str]) -> list[str]:
    """DistributedDataParallel's ``device_ids``: CUDA devices where this torch has them, else CPU core groups."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return [f"{kind}:{i}" if isinstance(i, int) else str(i) for i in device_ids]
