"""Distributed: the same Plan, Program and worker, one process a device, over ``torch.distributed``."""

from partita.runtime.distributed.world import World, join_world, launched

__all__ = ["World", "join_world", "launched"]
