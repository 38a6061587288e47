"""Every built-in sharding rule, by importing the modules that enter them."""

from partita.sharding import (  # noqa: F401
    rules_elementwise,
    rules_factory,
    rules_index,
    rules_linear,
    rules_loss,
    rules_moved,
    rules_nn,
    rules_reduce,
    rules_shape,
)
