"""What is compiled: the update of an optimizer, or a whole step of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_effopt.tpu import compiler, report
from tf_effopt.tpu.replicas import ProgramStrategy
from tf_effopt.tpu.report import Report

# Of the bytes of weights and state: sums that don't count, and much memory besides.
NEGLIGIBLE_SUM, MUCH_MEMORY = 0.03, 0.1


def compile_update(
    make_model: Callable[[], keras.Model], topology: str = "v5e:2x2"
) -> Report:
    """Compiles one update of a model's optimizer for all devices of a TPU slice.

    Gradients are summed over the devices within the program. Where the sums don't fit
    into vector memory, or the program needs much memory besides, they take the gradients'
    place, as within a step of training, if it then needs less.

        def make_model():
            model = keras.applications.ResNet50(weights=None)
            model.compile(tf_effopt.AdamW(1e-3), "sparse_categorical_crossentropy")
            return model

        print(tf_effopt.tpu.compile_update(make_model, "v5e:4x4"))

    Args:
        make_model: a function that makes the model, built and compiled; whose the
            optimizer is doesn't matter.
        topology: such as `"v4:2x2x1"`, `"v5e:2x2"`, `"v5p:2x2x1"` or `"v6e:2x2"`.

    Returns:
        A `Report`, even if the compiler refuses.

    Raises:
        ImportError: the extra `[tpu-compile]` isn't installed.
        ValueError: there is no such topology, or the model isn't built or compiled.
    """
    strategy, model = _made(make_model, topology)
    optimizer, weights = model.optimizer, model.trainable_variables

    def update(*gradients: Any) -> None:
        optimizer.apply(list(gradients), weights)

    def overwriting_update(*gradients: Any) -> list[Any]:
        update(*gradients)
        return strategy.sums_of(gradients)

    specs = [tf.TensorSpec(v.shape, v.dtype) for v in weights]
    blank = _blank(f"update of {model.name}", optimizer, weights, topology, strategy)
    found = _compiled(blank, strategy, update, specs)
    fits_in_vector_memory = found.summed_bytes < NEGLIGIBLE_SUM * found.state_bytes
    needs_little = found.temporary_bytes < MUCH_MEMORY * found.state_bytes
    if found.error is None and fits_in_vector_memory and needs_little:
        return found
    other = _compiled(blank, strategy, overwriting_update, specs, overwrites=True)
    return min(found, other, key=lambda r: (r.error is not None, r.temporary_bytes))


def compile_train_step(
    make_model: Callable[[], keras.Model],
    batch_size: int,
    topology: str = "v5e:2x2",
    data: Any = None,
) -> Report:
    """Compiles a whole step of training, one replica on each device of a TPU slice.

    Forward, backward, the sum of gradients, the update and the metrics: what Keras's
    `train_step` does.

    Args:
        make_model: see `compile_update`.
        batch_size: int, examples over all devices, a multiple of their number.
        topology: see `compile_update`.
        data: what `train_step` takes, such as `(x, y)`, with a `tf.TensorSpec` of one
            device's part of a batch for each tensor. By default that of the model's
            inputs, and for `y` that of its outputs, or class numbers where the loss
            is a sparse one.

    Returns:
        A `Report`, even if the compiler refuses: with its memory, if that is why.

    Raises:
        ImportError: the extra `[tpu-compile]` isn't installed.
        ValueError: see `compile_update`; or the devices can't share the batch.
    """
    strategy, model = _made(make_model, topology)
    replicas = strategy.num_replicas_in_sync
    if batch_size < 1 or batch_size % replicas:
        raise ValueError(
            f"`batch_size` must be a multiple of the {replicas} devices of {topology}. "
            f"Received: batch_size={batch_size}"
        )
    if data is None:
        data = _data_of(model, batch_size // replicas)
    what = f"training step of {model.name}, batch of {batch_size}"
    weights = model.trainable_variables
    blank = _blank(what, model.optimizer, weights, topology, strategy)
    return _compiled(blank, strategy, model.train_step, [data])


def _made(
    make_model: Callable[[], keras.Model], topology: str
) -> tuple[ProgramStrategy, keras.Model]:
    """The strategy of a topology, and a model made in it, its optimizer built."""
    strategy = ProgramStrategy(len(compiler.topology_devices(topology)))
    with strategy.scope():
        model = make_model()
        if not (isinstance(model, keras.Model) and model.built and model.compiled):
            raise ValueError(
                "`make_model` must return a Keras model that is built and compiled. "
                f"Received: {model!r}"
            )
        model.optimizer.build(model.trainable_variables)
    return strategy, model


def _data_of(model: keras.Model, batch_size: int) -> tuple:
    """The specs of `x` and `y` of one device, as far as they can be guessed."""
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"What {model.name} takes can't be seen from it: pass `data=(x, y)` with a "
            "`tf.TensorSpec` for each tensor, of one device's part of a batch."
        )

    def spec(shape: Sequence[int | None], dtype: str) -> tf.TensorSpec:
        if None in shape[1:]:
            raise ValueError(
                f"A program for TPU has fixed shapes. {model.name} takes {shape}: give it "
                "an input of a fixed shape, or pass `data=(x, y)` to "
                "`compile_train_step`, with those of one device's part of a batch."
            )
        return tf.TensorSpec((batch_size, *shape[1:]), dtype)

    def target(t: keras.KerasTensor, loss: Any) -> tf.TensorSpec:
        if _takes_class_numbers(loss):
            return spec(t.shape[:-1], "int32")
        return spec(t.shape, "float32")

    if isinstance(model, keras.Sequential):  # It has no `input`.
        (inputs,), (outputs,) = model.inputs, model.outputs
    else:
        inputs, outputs = model.input, model.output
    x = keras.tree.map_structure(lambda t: spec(t.shape, t.dtype), inputs)
    flat = keras.tree.flatten(outputs)
    losses = _losses_of(model, outputs, len(flat))
    if len(losses) != len(flat):
        raise ValueError(
            f"{model.name} has {len(flat)} outputs and {len(losses)} losses: pass "
            "`data=(x, y)` to `compile_train_step`."
        )
    y = [target(*pair) for pair in zip(flat, losses, strict=True)]
    return x, keras.tree.pack_sequence_as(outputs, y)


def _losses_of(model: keras.Model, outputs: Any, count: int) -> list[Any]:
    """The loss of each output, in the order of the outputs flattened."""
    if isinstance(model.loss, dict):
        by_key = isinstance(outputs, dict)
        names = sorted(outputs) if by_key else model.output_names
        return [model.loss.get(name) for name in names]
    if isinstance(model.loss, list | tuple):
        return list(model.loss)
    return [model.loss] * count


def _takes_class_numbers(loss: Any) -> bool:
    """By its name: `loss` is one, a function, or an object."""
    function = getattr(loss, "fn", loss)
    names = [loss, getattr(function, "__name__", ""), type(loss).__name__]
    return any(
        name.lower().replace("_", "").startswith("sparse")
        for name in names
        if isinstance(name, str)
    )


def _blank(
    what: str,
    optimizer: keras.optimizers.Optimizer,
    weights: Sequence[keras.Variable],
    topology: str,
    strategy: ProgramStrategy,
) -> Report:
    own = type(optimizer).__module__.partition(".")[0] == "tf_effopt"
    kept = [*weights, *(v for v in optimizer.variables if len(v.shape))]
    return Report(
        ("" if own else "keras.") + type(optimizer).__name__,
        what,
        topology,
        strategy.num_replicas_in_sync,
        sum(v.value.dtype.size * v.value.shape.num_elements() for v in kept),
    )


def _compiled(
    blank: Report,
    strategy: ProgramStrategy,
    function: Callable,
    specs: Sequence[Any],
    overwrites: bool = False,
) -> Report:
    """`overwrites`: whether what it returns takes its arguments' place, one by one."""

    @tf.function(jit_compile=True, autograph=False)
    def program(*flat: Any) -> Any:
        with strategy.scope():
            arguments = tf.nest.pack_sequence_as(specs, flat)
            return strategy.extended.call_for_each_replica(function, arguments)

    flat = tf.nest.flatten(specs)
    try:
        returned = program.get_concrete_function(*flat).outputs
        overwritten = flat[: len(returned)] if overwrites else []
        lowered = program.experimental_get_compiler_ir(*flat)
        # As for a CPU: functions with variables can't be lowered for a TPU that
        # isn't there.
        hlo = lowered(stage="hlo_serialized", platform_name="CPU")
        compiled = compiler.compile_hlo(
            hlo, blank.topology, blank.replicas, len(overwritten)
        )
    except (compiler.CompileError, tf.errors.OpError) as error:
        return report.failed(blank, error)
    not_state = sum(x.dtype.size * x.shape.num_elements() for x in overwritten)
    return report.filled_in(blank, compiled, not_state)
