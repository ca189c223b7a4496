"""Methods that a subclass or an instance overrides: called, or refused at once."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import tf_effopt
from tf_effopt.base import overrides

IGNORED = sorted(overrides.IGNORED)


def own(cls: type) -> set[str]:
    """The methods and properties that Keras's classes define for their optimizers."""
    return {
        name
        for base in cls.__mro__
        if base.__module__.partition(".")[0] == "keras"
        for name, value in vars(base).items()
        if inspect.isroutine(value) or isinstance(value, property)
    }


def test_every_method_of_keras_is_called_or_refused():
    names = own(keras.optimizers.Optimizer)
    assert names - overrides.CALLED - overrides.IGNORED.keys() == set()
    assert not overrides.CALLED & overrides.IGNORED.keys()


def test_every_method_of_keras_loss_scaling_is_called_or_refused():
    names = own(keras.optimizers.LossScaleOptimizer)
    refused = overrides.IGNORED.keys() | overrides.IGNORED_BY_LOSS_SCALE.keys()
    assert names - overrides.CALLED - refused == set()


def ignored(self: Any, *args: Any, **kwargs: Any) -> None:
    raise AssertionError("nothing calls it")


@pytest.mark.parametrize("base", [tf_effopt.Optimizer, tf_effopt.AdamW])
@pytest.mark.parametrize("name", IGNORED)
def test_a_class_with_a_method_that_nothing_calls_is_refused(name, base):
    with pytest.raises(TypeError, match=f"Mine.{name}` would be ignored.*Instead, "):
        type("Mine", (base,), {name: ignored})


def test_a_mixin_is_refused():
    class Mixin:
        def _clip_gradients(self, grads):
            return grads

    with pytest.raises(TypeError, match="Mixin._clip_gradients` would be ignored"):

        class Before(Mixin, tf_effopt.Adam):
            pass

    with pytest.raises(TypeError, match="SGD.update_step` would be ignored"):

        class OfKeras(tf_effopt.Adam, keras.optimizers.SGD):
            pass


@pytest.mark.parametrize("name", IGNORED)
def test_an_instance_is_refused(name):
    optimizer = tf_effopt.SGD()
    with pytest.raises(AttributeError, match=f"optimizer.{name}` would be ignored"):
        setattr(optimizer, name, ignored)
    optimizer.__dict__[name] = ignored
    with pytest.raises(TypeError, match=f"optimizer.{name}` would be ignored"):
        optimizer.build([keras.Variable([1.0])])


def test_a_class_changed_later_is_refused_at_build():
    class Mine(tf_effopt.SGD):
        pass

    optimizer = Mine()
    Mine.update_step = ignored
    with pytest.raises(TypeError, match="Mine.update_step` would be ignored"):
        optimizer.build([keras.Variable([1.0])])


def test_hooks_of_keras_class_of_the_same_name_are_refused():
    with pytest.raises(TypeError, match="Mine.lr_adjust` would be ignored"):
        type("Mine", (tf_effopt.Muon,), {"lr_adjust": ignored})


@pytest.mark.parametrize("value", [0.5, property(lambda self: 0.5)])
def test_a_hyperparameter_replaced_by_what_the_update_ignores(value):
    with pytest.raises(TypeError, match="`momentum` of Mine is a hyperparameter"):
        type("Mine", (tf_effopt.SGD,), {"momentum": value})
    with pytest.raises(TypeError, match="`decay` of Mine is a hyperparameter"):
        type("Mine", (tf_effopt.transforms.ZClip,), {"decay": value})


def test_another_range_for_a_hyperparameter():
    class Mine(tf_effopt.SGD):
        momentum = tf_effopt.hyperparameters.DecayRate(allow_zero=False)

    with pytest.raises(ValueError, match=r"`momentum` must be in \(0, 1\)"):
        Mine(momentum=0.0)


def test_a_rule_set_after_build_is_refused():
    optimizer = tf_effopt.SGD()
    optimizer.build([keras.Variable([1.0])])
    for name in ("rule", "model_rule", "part", "elementwise"):
        with pytest.raises(AttributeError, match=f"`{name}` can't change after"):
            setattr(optimizer, name, None)


# ------------------------------------------------------------- what is called


class Logged(tf_effopt.SGD):
    """Overrides what may be overridden."""

    called: Any = None

    def note(self, name: str) -> None:
        self.__dict__.setdefault("calls", []).append(name)

    def build(self, variables):
        self.note("build")
        super().build(variables)

    def add_variable_from_reference(self, reference_variable, name=None, **kwargs):
        self.note(f"slot {name}")
        return super().add_variable_from_reference(
            reference_variable, name=name, **kwargs
        )

    def apply(self, grads, trainable_variables=None):
        self.note("apply")
        super().apply([2 * g for g in grads], trainable_variables)

    def scale_loss(self, loss):
        self.note("scale_loss")
        return super().scale_loss(loss)

    @property
    def learning_rate(self):
        return 0.5 * ops.convert_to_tensor(self._get_current_learning_rate())


def test_overridden_methods_are_called_in_fit():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros((1, 1))])
    model.compile(Logged(0.1, momentum=0.9), "mse", auto_scale_loss=False)
    model.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0)
    calls = model.optimizer.__dict__["calls"]
    assert set(calls) == {"build", "slot momentum", "apply", "scale_loss"}
    # The gradient -2, doubled, at half the rate.
    np.testing.assert_allclose(model.get_weights()[0], [[0.2]], rtol=1e-6)


class Doubling(tf_effopt.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply([2 * g for g in grads], trainable_variables)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("on_instance", [False, True])
@pytest.mark.parametrize("module", [tf_effopt, keras.optimizers])
def test_loss_scaling_calls_an_overridden_apply(module, on_instance, compiled):
    inner = (tf_effopt.SGD if on_instance else Doubling)(0.25)
    if on_instance:
        plain = inner.apply
        inner.apply = lambda grads, trainable_variables=None: plain(
            [2 * g for g in grads], trainable_variables
        )
    optimizer = module.LossScaleOptimizer(inner, initial_scale=4.0)
    w = keras.Variable([1.0])
    optimizer.build([w])

    def step(g: Any) -> None:
        optimizer.apply([g], [w])

    run = tf.function(step) if compiled else step
    run(tf.constant([4.0]))  # a gradient of 1
    assert w.numpy()[0] == 0.5
    run(tf.constant([np.inf]))
    assert w.numpy()[0] == 0.5
    assert float(optimizer.dynamic_scale) == 2.0
    assert int(inner.iterations) == 1


def test_multi_optimizer_calls_an_overridden_apply():
    OptimizerMap = keras.optimizers.OptimizerMap
    w = keras.Variable([1.0])
    keras.optimizers.MultiOptimizer(OptimizerMap(Doubling(0.25))).apply(
        [ops.ones(1)], [w]
    )
    assert w.numpy()[0] == 0.5


@pytest.mark.parametrize("name", ["apply_gradients", "scale_loss"])
def test_what_a_wrapper_passes_by_is_refused(name):
    inner = type("Mine", (tf_effopt.SGD,), {name: ignored})()
    with pytest.raises(ValueError, match=f"Mine has its own `{name}`, which a wrapper"):
        tf_effopt.LossScaleOptimizer(inner)


@pytest.mark.parametrize("name", sorted(overrides.IGNORED_BY_LOSS_SCALE))
def test_hooks_of_loss_scaling_that_nothing_calls(name):
    with pytest.raises(TypeError, match=f"Mine.{name}` would be ignored"):
        type("Mine", (tf_effopt.LossScaleOptimizer,), {name: ignored})
    optimizer = tf_effopt.LossScaleOptimizer(tf_effopt.SGD())
    with pytest.raises(AttributeError, match=f"{name}` would be ignored"):
        setattr(optimizer, name, ignored)
