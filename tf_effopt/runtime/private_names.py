"""The private names of Keras and TensorFlow that this package uses: all of them.

A release may move or remove them. They are looked up when they are used, so that the
package can be imported under a Keras that it doesn't know, and an error names what is
missing and in which version. `missing()` is what a test looks at, after a test that
nothing private is used elsewhere. (Those of jax that lead to libtpu's compiler are in
`tf_effopt/tpu/compiler.py`, whose wheels are pinned.)
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import keras

SUPPORTED = "Keras 3.15.1 to 3.16 and TensorFlow 2.19.1 to 2.22"


class PrivateName:
    """An attribute of a module, or of a class in it: `"module:Class.attribute"`.

    Args:
        *places: where it is, the newest version's first.
    """

    def __init__(self, *places: str):
        self.places = places

    def __repr__(self) -> str:
        return " or ".join(place.replace(":", ".") for place in self.places)

    def _found(self) -> tuple[Any, str] | None:
        for place in self.places:
            module, path = place.split(":")
            *owners, name = path.split(".")
            try:
                owner = importlib.import_module(module)
            except ImportError:
                continue
            for attribute in owners:
                owner = getattr(owner, attribute, None)
            if hasattr(owner, name):
                return owner, name
        return None

    def exists(self) -> bool:
        return self._found() is not None

    def place(self) -> tuple[Any, str]:
        """Its owner, in which it can be replaced, and its name there.

        Raises:
            RuntimeError: the installed version has it in none of its places.
        """
        found = self._found()
        if found is None:
            raise RuntimeError(message([repr(self)]))
        return found

    def get(self) -> Any:
        return getattr(*self.place())


@dataclasses.dataclass(frozen=True)
class Attributes:
    """Private attributes of objects of one kind.

    Args:
        owner: names the kind.
        names: of the attributes.
        example: makes an object that must have them.
    """

    owner: str
    names: tuple[str, ...]
    example: Callable[[], Any]

    def missing(self) -> list[str]:
        example = self.example()
        return [f"{self.owner}.{x}" for x in self.names if not hasattr(example, x)]


# ------------------------------------------------------------- Keras, any backend

# What `keras.optimizers.get` makes of a string.
NAMES_OF_OPTIMIZERS = PrivateName("keras.src.optimizers:ALL_OBJECTS_DICT")
OPTIMIZER = (
    "_check_variables_are_known",
    "_get_current_learning_rate",
    "_get_variable_index",
    "_iterations",
    "_learning_rate",
    "_overwrite_variable_with_gradient",
    "_overwrite_variables_directly_with_gradients",
    "_track_variable",
    "_trainable_variables",
    "_trainable_variables_indices",
    "_var_key",
    "_variables",
)
# On models of the JAX backend, the newest version's first.
STATE_SYNC = ("state_sync", "jax_state_sync")


def _built_optimizer() -> keras.optimizers.Optimizer:
    options = {"use_ema": True, "gradient_accumulation_steps": 2}
    optimizer = keras.optimizers.Optimizer(learning_rate=0.1, **options)
    optimizer.build([keras.Variable([0.0])])
    return optimizer


def _built(layer: keras.layers.Layer) -> keras.layers.Layer:
    layer.build((2, 2))
    return layer


def _layers() -> dict[str, Callable[[], Any]]:
    layers = keras.layers
    return {
        "Dense": lambda: _built(layers.Dense(2)),
        "EinsumDense": lambda: _built(layers.EinsumDense("ab,bc->ac", 2)),
    }


OF_KERAS = [
    Attributes("Optimizer", OPTIMIZER, lambda: keras.optimizers.Optimizer(0.1)),
    # Read by `keras.callbacks.SwapEMAWeights` and by Keras's checkpoints.
    Attributes(
        "Optimizer",
        ("_accumulated_gradients", "_model_variables_moving_average"),
        _built_optimizer,
    ),
    Attributes("Layer", ("_flatten_layers", "_losses"), keras.layers.Layer),
    Attributes("Operation", ("_inbound_nodes",), keras.layers.Layer),
    Attributes("KerasTensor", ("_keras_history",), lambda: keras.Input((1,))),
    Attributes("Variable", ("_layout", "_value"), lambda: keras.Variable(0.0)),
    # The weights behind properties that LoRA and quantization change.
    *(Attributes(x, ("_kernel",), example) for x, example in _layers().items()),
    Attributes(
        "Embedding", ("_embeddings",), lambda: _built(keras.layers.Embedding(2, 2))
    ),
]

# ------------------------------------------- Keras on TensorFlow, and TensorFlow

_LOSSES = "keras.src.losses.loss"
_METRICS = "keras.src.metrics.reduction_metrics"
_TRAINER = "keras.src.backend.tensorflow.trainer"
_DISTRIBUTE = "tensorflow.python.distribute"

APPLY_MASK = PrivateName(f"{_LOSSES}:apply_mask")
REDUCE_VALUES = PrivateName(f"{_LOSSES}:reduce_values")
SCALE_LOSS = PrivateName(f"{_LOSSES}:scale_loss_for_distribution")
UNSCALE_LOSS = PrivateName(f"{_LOSSES}:unscale_loss_for_distribution")
CALL_LOSS = PrivateName(f"{_LOSSES}:Loss.__call__")
SAMPLEWISE_VALUES = PrivateName(f"{_METRICS}:reduce_to_samplewise_values")
UPDATE_METRIC = PrivateName(f"{_METRICS}:MeanMetricWrapper.update_state")
COMPUTE_MOMENTS = PrivateName(
    "keras.src.backend.tensorflow.ops.nn:_compute_moments_sync",
    "keras.src.backend.tensorflow.nn:_compute_moments_sync",  # Keras 3.15
)
EPOCH_ITERATOR = PrivateName(f"{_TRAINER}:TFEpochIterator.__init__")
GLOBAL_ATTRIBUTE = PrivateName(
    "keras.src.backend.common.global_state:get_global_attribute"
)
CALL_CONTEXT = "current_call_ctx"  # Keras's state while it is in a layer's call
# What TensorFlow calls for each operation.
EAGER_CONTEXT = PrivateName("tensorflow.python.eager.context:context")
MERGE_CALL = PrivateName(
    "tensorflow:__internal__.distribute.strategy_supports_no_merge_call"
)
LAUNCHER = PrivateName(
    f"{_DISTRIBUTE}.cross_device_utils:"
    "CollectiveReplicaLauncher._prefer_unique_instance_key"
)
PER_REPLICA_SPEC = PrivateName(f"{_DISTRIBUTE}.values:PerReplicaSpec")
COMPONENT = PrivateName(
    f"{_DISTRIBUTE}.values:DistributedVariable._get_on_device_or_primary"
)
ONE_DEVICE = PrivateName(f"{_DISTRIBUTE}.one_device_strategy:OneDeviceExtended")
XLA_REPLICA = PrivateName("tensorflow.compiler.tf2xla.ops.gen_xla_ops:xla_replica_id")
XLA_ALL_REDUCE = PrivateName(
    "tensorflow.compiler.tf2xla.ops.gen_xla_ops:xla_all_reduce"
)


def _tensorflow() -> Any:
    return importlib.import_module("tensorflow")


def _epoch_iterator() -> Any:
    make, _ = EPOCH_ITERATOR.place()
    strategy = _tensorflow().distribute.get_strategy()
    x = keras.ops.convert_to_numpy(keras.ops.zeros((1, 1)))
    return make(x=x, y=x, batch_size=1, distribute_strategy=strategy)


def _mirrored() -> Any:
    return _tensorflow().distribute.MirroredStrategy(["CPU:0"]).extended


# What `prepare` replaces, and asks of the class.
MODEL = Attributes(
    "Model",
    ("_make_function", "_maybe_symbolic_build", "_symbolic_build"),
    lambda: keras.Model,
)
OF_TENSORFLOW = [
    MODEL,
    Attributes(
        "Optimizer",
        ("_handle_deferred_dependencies", "_lookup_dependency", "_trackable_children"),
        lambda: keras.optimizers.Optimizer(0.1),
    ),
    Attributes("TFEpochIterator", ("_distributed_dataset",), _epoch_iterator),
    Attributes(
        "Function",
        ("_omit_frequent_tracing_warning",),
        lambda: _tensorflow().function(lambda: None),
    ),
    Attributes(
        "ConcreteFunction",
        ("_call_flat",),
        lambda: _tensorflow().function(lambda: None).get_concrete_function(),
    ),
    Attributes("Graph", ("_variable_creator_stack",), lambda: _tensorflow().Graph()),
    Attributes("extended", ("_cross_device_ops", "_in_multi_worker_mode"), _mirrored),
    Attributes(
        "OneDeviceExtended",
        (
            "_call_for_each_replica",
            "_container_strategy",
            "_create_variable",
            "_num_replicas_in_sync",
            "_replica_ctx_all_reduce",
            "_use_merge_call",
        ),
        ONE_DEVICE.get,
    ),
    Attributes(
        "PerReplicaSpec",
        ("_component_specs",),
        lambda: PER_REPLICA_SPEC.get()(_tensorflow().TensorSpec(())),
    ),
    Attributes("Context", ("op_callbacks",), lambda: EAGER_CONTEXT.get()()),
]


# ------------------------------------------------------------------------ checks


def attribute(owner: Any, name: str) -> Any:
    """A private attribute of an object.

    Raises:
        RuntimeError: the installed version's objects don't have it.
    """
    if not hasattr(owner, name):
        raise RuntimeError(message([f"{type(owner).__name__}.{name}"]))
    return getattr(owner, name)


def check_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises an error that names what an optimizer of this Keras doesn't have.

    Raises:
        RuntimeError: it lacks private names that the engine uses.
    """
    absent = [f"Optimizer.{name}" for name in OPTIMIZER if not hasattr(optimizer, name)]
    if absent:
        raise RuntimeError(message(absent))


def check(names: list[PrivateName], kind: Attributes) -> None:
    """Raises an error that names what the installed packages don't have.

    Raises:
        RuntimeError: some of `names`, of `kind` or of a layer's call are missing.
    """
    absent = [repr(name) for name in names if not name.exists()]
    if absent := absent + kind.missing() + _missing_context():
        raise RuntimeError(message(absent))


def missing() -> list[str]:
    """The names of this list that the installed packages don't have."""
    names = [NAMES_OF_OPTIMIZERS, GLOBAL_ATTRIBUTE]
    is_tensorflow = keras.backend.backend() == "tensorflow"
    if is_tensorflow:
        names = [x for x in globals().values() if isinstance(x, PrivateName)]
    absent = [repr(name) for name in names if not name.exists()]
    for kind in [*OF_KERAS, *(OF_TENSORFLOW if is_tensorflow else ())]:
        try:
            absent += kind.missing()
        except RuntimeError:  # The class itself is missing, and was named.
            continue
    if "skip_mismatch" not in inspect.signature(keras.Model.load_weights).parameters:
        absent.append("Model.load_weights(skip_mismatch)")
    syncs = any(hasattr(keras.Model, name) for name in STATE_SYNC)
    if keras.backend.backend() == "jax" and not syncs:
        absent.append(f"Model.{' or '.join(STATE_SYNC)}")
    return absent + _missing_context()


def _missing_context() -> list[str]:
    """Whether Keras tells that it is in a layer's call."""
    seen = []

    class Called(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            seen.append(GLOBAL_ATTRIBUTE.get()(CALL_CONTEXT))
            return x

    if GLOBAL_ATTRIBUTE.exists():
        Called()(keras.ops.zeros((1,)))
    return [] if None not in seen else [f"global_state.{CALL_CONTEXT}"]


def message(missing: list[str]) -> str:
    """What to say of names that the installed packages don't have."""
    return (
        f"{_installed()} has no {', '.join(missing)}, which tf_effopt uses. Install "
        f"versions that this tf_effopt works with ({SUPPORTED}), or a newer tf_effopt."
    )


def _installed() -> str:
    tensorflow = sys.modules.get("tensorflow")  # not imported for this
    version = getattr(tensorflow, "__version__", None)
    return f"Keras {keras.__version__}" + (
        f" with TensorFlow {version}" if version else ""
    )
