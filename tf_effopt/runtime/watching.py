"""Which tools of `tf.debugging` watch the operations that are made now.

`tf.debugging.enable_check_numerics` and `enable_dump_debug_info` add operations
after each operation of this thread, eager or in a function that is traced. XLA
can't compile them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tf_effopt.runtime import private_names

_context = functools.cache(private_names.EAGER_CONTEXT.get)


def watchers() -> tuple[Callable, ...]:
    """What TensorFlow calls for each operation of this thread."""
    return tuple(private_names.attribute(_context()(), "op_callbacks"))
