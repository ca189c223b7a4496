"""A strategy whose replicas are the devices that one program is compiled for.

TensorFlow's own `TPUStrategy` wants a TPU. Under this one a function is traced once,
as under that, and its sums over replicas become all-reduces of the program, in the
optimizer as well as in layers such as `BatchNormalization(synchronized=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_effopt.runtime import private_names
from tf_effopt.tpu.compiler import CompileError


class ProgramStrategy(tf.distribute.Strategy):
    """`replicas` devices, each running the same program on its own data."""

    compiles_steps = True  # as the engine asks: nothing has to be compiled by itself

    def __init__(self, replicas: int):
        super().__init__(_Extended(self, replicas))

    def sums_of(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What tensors came to, summed over replicas; empty if one wasn't."""
        sums = [self.extended.sums.get(x.ref()) for x in tensors]
        return [] if any(x is None for x in sums) else sums


class _Extended(private_names.ONE_DEVICE.get()):
    def __init__(self, strategy: ProgramStrategy, replicas: int):
        # Where variables are made and the function is traced.
        super().__init__(strategy, "/device:CPU:0")
        self._replicas = replicas
        self.sums: dict[Any, tf.Tensor] = {}  # by a reference to what was summed

    @property
    def _num_replicas_in_sync(self) -> int:
        return self._replicas

    def _create_variable(self, next_creator: Callable, **options: Any) -> tf.Variable:
        variable = super()._create_variable(next_creator, **options)
        variable.distribute_strategy = self._container_strategy()  # as its kinds have
        return variable

    def _use_merge_call(self) -> bool:
        return False

    def _call_for_each_replica(self, fn: Callable, args: Any, kwargs: Any) -> Any:
        strategy = self._container_strategy()
        number = private_names.XLA_REPLICA.get()()
        with tf.distribute.ReplicaContext(strategy, number):
            return fn(*args, **kwargs)

    def _replica_ctx_all_reduce(
        self, reduce_op: Any, value: Any, options: Any = None
    ) -> Any:
        group = [list(range(self._replicas))]

        def reduced(x: Any) -> Any:
            x = tf.convert_to_tensor(x)  # `TPUStrategy` makes rows dense, too
            if x.dtype == tf.float64:
                raise CompileError(
                    "A TPU can't sum float64 over its devices: make the model's weights "
                    "float32 or bfloat16."
                )
            total = private_names.XLA_ALL_REDUCE.get()(x, group, "Add", "CrossReplica")
            self.sums[x.ref()] = total
            mean = reduce_op == tf.distribute.ReduceOp.MEAN
            return total / self._replicas if mean else total

        return tf.nest.map_structure(reduced, value)
