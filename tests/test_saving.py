"""Saved state goes on where it stopped: ours, Keras's in ours, ours in Keras's."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BY_NAME, CASES, KINDS, WITH_COUNTERPART, arrays

import tf_effopt

STEPS = 4
TOLERANCE = 2e-6

every_case = pytest.mark.parametrize("case", CASES, ids=cases.by_name)
every_shared_case = pytest.mark.parametrize("case", WITH_COUNTERPART, ids=cases.by_name)


def everything(model: keras.Model) -> list[np.ndarray]:
    """Weights, then the optimizer's state."""
    return arrays(model.weights) + arrays(model.optimizer.variables)


def assert_identical(model: keras.Model, expected: list[np.ndarray]) -> None:
    values = everything(model)
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, other)


def assert_near(model: keras.Model, expected: list[np.ndarray]) -> None:
    values = everything(model)
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=TOLERANCE, atol=TOLERANCE)


# ------------------------------------------------------------- our own files


@dataclass(frozen=True)
class Run:
    """A model that trained, was saved, and trained on.

    Attributes:
        model: may be loaded into: each test restores all that it uses.
        stem: of the files from halfway, `.keras`, `.weights.h5` and `.tf`.
        store: the optimizer's own variables from halfway.
        halfway, expected: weights and state, halfway and at the end.
    """

    model: keras.Model
    stem: Path
    store: dict[str, np.ndarray]
    halfway: list[np.ndarray]
    expected: list[np.ndarray]


def run_and_save(optimizer: Any, stem: Path) -> Run:
    model = cases.train(cases.compiled_model(optimizer), STEPS)
    model.save(f"{stem}.keras")
    model.save_weights(f"{stem}.weights.h5")
    tf.train.Checkpoint(model=model, optimizer=optimizer).write(f"{stem}.tf")
    store: dict[str, np.ndarray] = {}
    optimizer.save_own_variables(store)
    halfway = everything(model)
    return Run(model, stem, store, halfway, everything(cases.train(model, STEPS)))


SETTINGS = {"weight_decay": 0.1, "use_ema": True}


def settings_of(case: cases.Case) -> dict[str, Any]:
    """Of a run, ours or Keras's; without a decay that would differ."""
    return SETTINGS if case.same_decay else {"use_ema": True}


@pytest.fixture(scope="module")
def our_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return functools.cache(
        lambda case: run_and_save(case.make(**settings_of(case)), folder / case.name)
    )


@pytest.fixture(scope="module")
def keras_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    return functools.cache(
        lambda case: run_and_save(case.keras(**settings_of(case)), folder / case.name)
    )


@pytest.mark.representatives(*KINDS)
@every_case
def test_model_from_keras_file_is_as_it_was_saved(case, our_run):
    """How it goes on: test_resumed.py, in a separate process."""
    run = our_run(case)
    model = keras.models.load_model(f"{run.stem}.keras")
    assert type(model.optimizer) is type(case.make())
    assert_identical(model, run.halfway)


@pytest.mark.representatives(*(f"*-{name}" for name in KINDS))
@every_case
@pytest.mark.parametrize("extension", [".weights.h5", ".keras"])
def test_weights_from_file_continue_bit_identically(case, extension, our_run):
    run = our_run(case)
    run.model.load_weights(f"{run.stem}{extension}")
    assert_identical(cases.train(run.model, STEPS), run.expected)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_weights_from_file_wait_for_build(name, our_run):
    run = our_run(BY_NAME[name])
    model = cases.compiled_model(BY_NAME[name].make(**SETTINGS))
    model.load_weights(f"{run.stem}.weights.h5")
    assert not model.optimizer.built
    assert int(model.optimizer.iterations) == STEPS
    assert_identical(cases.train(model, STEPS), run.expected)


def test_a_learning_rate_set_after_loading_holds(our_run):
    """As a scheduler does at the start of an epoch, before the first batch builds."""
    run = our_run(BY_NAME["adam"])
    model = cases.compiled_model(BY_NAME["adam"].make(**SETTINGS))
    model.load_weights(f"{run.stem}.weights.h5")
    model.optimizer.learning_rate = 0.0
    before = arrays(model.weights)
    cases.train(model, STEPS)
    for value, old in zip(arrays(model.weights), before, strict=True):
        np.testing.assert_array_equal(value, old)
    assert int(model.optimizer.iterations) == 2 * STEPS


def test_state_loaded_before_build_is_there_after_build():
    case = BY_NAME["adam"]
    trained = cases.train(cases.compiled_model(case.make()), STEPS)
    store: dict[str, np.ndarray] = {}
    trained.optimizer.save_own_variables(store)
    optimizer = case.make()
    optimizer.load_own_variables(store)
    store.clear()  # A file is closed by then.
    optimizer.build(cases.small_model().trainable_variables)
    for mine, other in zip(optimizer.variables, trained.optimizer.variables):
        np.testing.assert_array_equal(mine.numpy(), other.numpy())


def test_loss_scale_optimizer_is_saved_with_its_inner_one(tmp_path):
    inner = tf_effopt.Adam(0.01, clipnorm=1.0)
    optimizer = tf_effopt.LossScaleOptimizer(inner, initial_scale=8.0)
    model = cases.train(cases.compiled_model(optimizer), STEPS)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is tf_effopt.LossScaleOptimizer
    assert type(loaded.optimizer.inner_optimizer) is tf_effopt.Adam
    assert loaded.optimizer.inner_optimizer.clipnorm == 1.0
    loaded.compile(loaded.optimizer, loss="mse", jit_compile=False)
    expected = everything(cases.train(model, STEPS))
    assert_identical(cases.train(loaded, STEPS), expected)


@pytest.mark.parametrize("make", [tf_effopt.Adam, keras.optimizers.Adam])
@pytest.mark.parametrize("how", ["weights", "saved_again"])
def test_loss_scale_that_was_loaded_waits_for_build(make, how, tmp_path):
    def compiled():
        optimizer = tf_effopt.LossScaleOptimizer(make(0.01), dynamic_growth_steps=2)
        return cases.compiled_model(optimizer)

    model = cases.train(compiled(), 5)
    model.save_weights(tmp_path / "first.weights.h5")
    loaded = compiled()
    if make is keras.optimizers.Adam:  # Keras's skips what it isn't built for.
        loaded.optimizer.inner_optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "first.weights.h5")
    if how == "saved_again":
        loaded.save_weights(tmp_path / "again.weights.h5")
        loaded.load_weights(tmp_path / "again.weights.h5")
    loaded.optimizer.build(loaded.trainable_variables)
    assert float(loaded.optimizer.dynamic_scale) == 2.0**17
    assert int(loaded.optimizer.step_counter) == 1
    expected = everything(cases.train(model, STEPS))
    assert_identical(cases.train(loaded, STEPS), expected)


@pytest.mark.parametrize("name", ["adam", "schedule_free_adamw"])
def test_model_of_mixed_precision_loads_without_its_loss_scale(name, tmp_path):
    """Keras wraps the optimizer, and saves the wrapper's state under its name."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = cases.compiled_model(BY_NAME[name].make(), cases.small_model())
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(model.optimizer) is keras.optimizers.LossScaleOptimizer
    cases.train(model, STEPS).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(BY_NAME[name].make())
    inner = model.optimizer.inner_optimizer
    for value, expected in zip(
        arrays(loaded.optimizer.variables), arrays(inner.variables), strict=True
    ):
        np.testing.assert_array_equal(value, expected)


def test_loss_scale_of_another_model_is_refused():
    store: dict[str, np.ndarray] = {}
    model = cases.compiled_model(tf_effopt.LossScaleOptimizer(tf_effopt.Adam()))
    cases.train(model, 1).optimizer.save_own_variables(store)
    other = tf_effopt.LossScaleOptimizer(tf_effopt.Adam())
    other.build([keras.Variable(np.zeros((3, 3)))])
    with pytest.raises(ValueError, match="state doesn't fit"):
        other.load_own_variables(store)


@pytest.mark.representatives("number-adafactor", "schedule-adam")
@pytest.mark.parametrize("name", ["adam", "adafactor", "schedule_free_adamw"])
@pytest.mark.parametrize("rate", [0.25, None], ids=["number", "schedule"])
def test_model_that_was_saved_before_it_trained(name, rate, tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.25, 10, 0.5)
    optimizer = BY_NAME[name].make(learning_rate=rate or schedule, use_ema=True)
    model = cases.compiled_model(optimizer)
    if rate:
        optimizer.learning_rate = 0.5
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.optimizer.learning_rate) == (0.5 if rate else 0.25)
    loaded.compile(loaded.optimizer, loss="mse", jit_compile=False)
    expected = everything(cases.train(model, STEPS))
    assert_identical(cases.train(loaded, STEPS), expected)


def assert_same(weights: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for found, value in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.representatives("plain-*", "keras-state-built", "ours-state-")
@pytest.mark.parametrize("built", [False, True], ids=["", "built"])
@pytest.mark.parametrize("in_file", ["nothing", "numbers", "state"])
@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, tf_effopt.LossScaleOptimizer, keras.optimizers.LossScaleOptimizer],
    ids=["plain", "ours", "keras"],
)
def test_pretrained_weights_of_another_training(wrap, in_file, built, tmp_path):
    """A file without a state, or with that of an optimizer that isn't wrapped."""
    path = tmp_path / "model.weights.h5"
    source = cases.small_model()
    source.set_weights([np.full(w.shape, 0.5) for w in source.weights])
    if in_file != "nothing":
        cases.compiled_model(BY_NAME["adam"].make(), source)
    if in_file == "state":
        cases.train(source, 1)
    source.save_weights(path)
    model = cases.compiled_model(wrap(BY_NAME["adam"].make()))
    if built:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    assert_same(model.get_weights(), source.get_weights())
    cases.train(model, 1)
    count = (
        2
        if in_file == "state" and wrap is not keras.optimizers.LossScaleOptimizer
        else 1
    )
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert int(inner.iterations) == count


@pytest.mark.parametrize("built", [False, True], ids=["", "built"])
def test_a_schedule_takes_no_learning_rate_of_a_file(built, tmp_path):
    path = tmp_path / "model.weights.h5"
    cases.compiled_model(tf_effopt.SGD(0.5)).save_weights(path)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.25, 10, 0.5)
    model = cases.compiled_model(tf_effopt.Adam(schedule))
    if built:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    cases.train(model, 1)
    assert int(model.optimizer.iterations) == 1


def built_early(optimizer: tf_effopt.Optimizer) -> keras.Model:
    """With an optimizer that is built before the weights are there."""
    model = cases.compiled_model(optimizer)
    model.set_weights([w + 1 for w in model.get_weights()])
    optimizer.build(model.trainable_variables)
    model.set_weights([w - 1 for w in model.get_weights()])
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prodigy", {}),
        ("schedule_free_adamw", {}),
        ("schedule_free_adamw", {"gradient_accumulation_steps": 2}),
        ("adam", {"use_ema": True}),
    ],
)
def test_weights_that_come_after_build_are_those_it_starts_at(name, options):
    make = BY_NAME[name].make
    expected = cases.train(cases.compiled_model(make(**options)), STEPS)
    found = cases.train(built_early(make(**options)), STEPS)
    assert_identical(found, everything(expected))


def test_a_weight_without_gradient_in_the_first_update_starts_at_itself():
    optimizer = BY_NAME["schedule_free_adamw"].make()
    weights = [keras.Variable([9.0]), keras.Variable([9.0])]
    optimizer.build(weights)
    weights[0].assign([1.0])
    weights[1].assign([2.0])
    optimizer.apply([tf.constant([1.0]), None], weights)
    slots = [v for v in optimizer.variables if v.path.endswith("momentum")]
    assert [float(slots[1][0]), len(slots)] == [2.0, 2]


@pytest.mark.parametrize("name", ["adam", "schedule_free_adamw"])
@pytest.mark.filterwarnings("ignore:.*weights for evaluation are in place")
def test_the_end_of_a_training_without_an_update_changes_nothing(name):
    average = {"use_ema": True} if name == "adam" else {}
    optimizer = BY_NAME[name].make(gradient_accumulation_steps=8, **average)
    model = built_early(optimizer)
    before = model.get_weights()
    model.fit(cases.X, cases.Y, batch_size=8, verbose=0)  # two of eight
    optimizer.use_evaluation_weights()
    assert_same(model.get_weights(), before)


def test_the_end_of_a_training_whose_values_are_gone():
    """So it is on JAX where a step has raised."""
    optimizer = tf_effopt.Adam(use_ema=True)
    weight = keras.Variable([1.0])
    optimizer.build([weight])
    optimizer._iterations._value = None
    optimizer.finalize_variable_values([weight])
    assert float(weight[0]) == 1.0


def with_group(name: str) -> tf_effopt.Optimizer:
    group = tf_effopt.Group("first", learning_rate_multiplier=0.5)
    return BY_NAME[name].make(use_ema=True, groups=[group])


@pytest.mark.representatives("adam-False", "muon-True", "<lambda>-bfloat16-True")
@pytest.mark.parametrize("compiled_anew", [False, True])
@pytest.mark.parametrize(
    "make, dtype",
    [
        *(
            pytest.param(functools.partial(with_group, name), None, id=name)
            for name in ("adam", "muon", "adafactor", "prodigy", "schedule_free_adamw")
        ),
        (lambda: tf_effopt.Adam(0.01, rounding="compensated"), "bfloat16"),
        (lambda: tf_effopt.LossScaleOptimizer(tf_effopt.Adam(0.01)), None),
    ],
)
def test_model_of_which_layers_were_frozen_after_training(
    make, dtype, compiled_anew, tmp_path
):
    """It is built on fewer variables than the state is of."""
    model = cases.train(cases.compiled_model(make(), cases.small_model(dtype)), STEPS)
    model.layers[0].trainable = False
    if compiled_anew:
        cases.train(cases.compiled_model(model.optimizer, model), STEPS)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.optimizer._trainable_variables) == 2
    cases.compiled_model(model.optimizer, model)
    cases.compiled_model(loaded.optimizer, loaded)
    expected = arrays(cases.train(model, STEPS).weights)
    for value, other in zip(arrays(cases.train(loaded, STEPS).weights), expected):
        np.testing.assert_array_equal(value, other)


def test_model_that_was_frozen_as_a_whole(tmp_path):
    model = cases.train(cases.compiled_model(tf_effopt.Adam(0.01)), STEPS)
    model.trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == STEPS
    np.testing.assert_array_equal(
        loaded.predict(cases.X, verbose=0), model.predict(cases.X, verbose=0)
    )


# ------------------------------------------------------------ configuration


@every_case
def test_config_round_trip(case):
    optimizer = case.make(weight_decay=0.2, clipnorm=3.0, rounding="compensated")
    config = optimizer.get_config()
    copied = type(optimizer).from_config(config)
    assert copied.get_config() == config
    assert config["rounding"] == "compensated" and config["lazy"] is False


@every_case
def test_config_is_all_a_new_optimizer_needs(case):
    optimizer = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(case.make(global_clipnorm=2.0))
    )
    assert type(optimizer) is type(case.make())
    assert optimizer.global_clipnorm == 2.0


def test_config_has_the_values_of_now():
    optimizer = tf_effopt.AdamW(0.01, weight_decay=0.1, clipnorm=1.0)
    optimizer.build([keras.Variable([1.0])])
    changes = {"beta_1": 0.5, "epsilon": 1e-3, "weight_decay": 0.3, "clipnorm": 2.0}
    for name, value in changes.items():
        setattr(optimizer, name, value)
    optimizer.learning_rate = 0.25
    config = optimizer.get_config()
    assert {name: config[name] for name in changes} == changes
    assert config["learning_rate"] == 0.25
    assert tf_effopt.AdamW.from_config(config).get_config() == config


def test_schedule_survives_in_the_config():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    config = tf_effopt.Adam(schedule).get_config()
    copied = tf_effopt.Adam.from_config(config)
    assert float(copied.learning_rate) == pytest.approx(0.1)
    copied._iterations.assign(10)
    assert float(copied.learning_rate) == pytest.approx(0.05)


def test_config_of_a_subclass_of_a_user():
    optimizer = HalvedDescent(learning_rate=0.5, share=0.25)
    serialized = keras.saving.serialize_keras_object(optimizer)
    copied = keras.saving.deserialize_keras_object(serialized)
    assert type(copied) is HalvedDescent and copied.share == 0.25


def halved_rule(g, slots, *, learning_rate, share):
    return -learning_rate * share * g, slots


class HalvedDescent(tf_effopt.Optimizer):
    rule = staticmethod(halved_rule)
    share = tf_effopt.hyperparameters.Fraction()

    def __init__(self, learning_rate=0.01, share=0.5, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.share = share


@pytest.mark.parametrize("class_name", ["Adam", "SGD", "RMSprop", "GradientDescent"])
def test_compile_by_registered_name(class_name):
    model = cases.compiled_model(f"tf_effopt>{class_name}")
    assert type(model.optimizer) is getattr(tf_effopt, class_name)


# ------------------------------------------------------- weight-decay masks


@keras.saving.register_keras_serializable("tests")
class Twins(keras.layers.Layer):
    """Two weights of the same path."""

    def build(self, shape: Any) -> None:
        self.one = self.add_weight(shape=(4,), initializer="ones", name="w")
        self.two = self.add_weight(shape=(4,), initializer="ones", name="w")

    def call(self, x: Any) -> Any:
        return x * self.one + self.two


EXCLUSIONS = {
    "var_list": (lambda m: {"var_list": [m.trainable_variables[0]]}, [0]),
    "paths": (lambda m: {"var_list": [m.trainable_variables[2].path]}, [2]),
    "var_names": (lambda m: {"var_names": ["bias", "first/k"]}, [0, 1, 3]),
    "both": (
        lambda m: {"var_list": [m.trainable_variables[2]], "var_names": ["bias"]},
        [1, 2, 3],
    ),
}


def _decay_exempt(model: keras.Model) -> list[int]:
    """Numbers of the variables that a step without gradient leaves alone."""
    variables = model.trainable_variables
    for v in variables:
        v.assign(np.ones(v.shape))
    model.optimizer.apply([np.zeros(v.shape, "float32") for v in variables], variables)
    for v in variables:
        assert np.all(v.numpy() == v.numpy().flat[0])
    values = [float(v.numpy().flat[0]) for v in variables]
    assert set(values) <= {1.0, 0.5}, values  # learning rate 1, decay 0.5
    return [i for i, value in enumerate(values) if value == 1.0]


@pytest.mark.parametrize("kind", EXCLUSIONS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
def test_decay_exclusions_are_saved_and_have_effect(kind, trained, tmp_path):
    arguments, expected = EXCLUSIONS[kind]
    model = cases.compiled_model(tf_effopt.SGD(1.0, weight_decay=0.5))
    model.optimizer.exclude_from_weight_decay(**arguments(model))
    if trained:
        assert _decay_exempt(model) == expected
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert _decay_exempt(loaded) == expected
    loaded.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    assert _decay_exempt(again) == expected


def test_decay_exclusion_tells_variables_of_equal_paths_apart(tmp_path):
    model = keras.Sequential([keras.Input((4,)), Twins()])
    cases.compiled_model(tf_effopt.SGD(1.0, weight_decay=0.5), model)
    one, two = model.trainable_variables
    assert one.path == two.path
    model.optimizer.exclude_from_weight_decay([two])
    assert _decay_exempt(model) == [1]
    model.save(tmp_path / "model.keras")
    assert _decay_exempt(keras.models.load_model(tmp_path / "model.keras")) == [1]


def test_decay_exclusion_survives_copies():
    model = cases.compiled_model(tf_effopt.SGD(1.0, weight_decay=0.5))
    variables = model.trainable_variables
    model.optimizer.exclude_from_weight_decay([variables[1]])
    for copied in (
        copy.deepcopy(model.optimizer),
        model.optimizer.carry_over(variables),
    ):
        model.optimizer = copied
        assert _decay_exempt(model) == [1]


def test_state_that_waits_for_the_build_isnt_lost(tmp_path):
    trained = cases.compiled_model(tf_effopt.Adam(0.01))
    cases.train(trained, 2)
    trained.save_weights(tmp_path / "trained.weights.h5")

    def waiting():
        model = cases.compiled_model(tf_effopt.Adam(0.01))
        model.load_weights(tmp_path / "trained.weights.h5")
        assert not model.optimizer.built
        return model

    model = waiting()
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    saved = cases.compiled_model(tf_effopt.Adam(0.01))
    saved.load_weights(tmp_path / "model.weights.h5")
    variables = model.trainable_variables
    found = [
        keras.models.load_model(tmp_path / "model.keras").optimizer,
        saved.optimizer,
        waiting().optimizer.carry_over(variables),
        copy.deepcopy(waiting().optimizer),
    ]
    for optimizer in found:
        optimizer.build(optimizer._trainable_variables or variables)
        for mine, theirs in zip(
            optimizer.variables, trained.optimizer.variables, strict=True
        ):
            np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


# ---------------------------------------------------- Keras's state, in ours


@every_shared_case
@pytest.mark.parametrize("extension", [".weights.h5", ".keras"])
def test_weights_of_keras_continue(case, extension, our_run, keras_run):
    ours, theirs = our_run(case), keras_run(case)
    ours.model.load_weights(f"{theirs.stem}{extension}")
    assert_near(cases.train(ours.model, STEPS), theirs.expected)


@every_shared_case
def test_own_variables_of_keras_continue(case, our_run, keras_run):
    ours, theirs = our_run(case), keras_run(case)
    model = ours.model
    model.set_weights(theirs.halfway[: len(model.weights)])
    model.optimizer.load_own_variables(theirs.store)
    assert_near(cases.train(model, STEPS), theirs.expected)


@every_shared_case
def test_checkpoint_of_keras_continues(case, our_run, keras_run):
    ours, theirs = our_run(case), keras_run(case)
    model = ours.model
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    status = checkpoint.read(f"{theirs.stem}.tf")
    status.assert_existing_objects_matched()
    status.assert_consumed()
    assert_identical(model, theirs.halfway)
    assert_near(cases.train(model, STEPS), theirs.expected)


@pytest.mark.representatives("sgd", "adam", "muon")
@every_shared_case
def test_loaded_optimizer_of_keras_can_be_replaced_by_ours(case, keras_run):
    theirs = keras_run(case)
    model = keras.models.load_model(f"{theirs.stem}.keras")
    optimizer = type(case.make()).from_config(model.optimizer.get_config())
    store: dict[str, np.ndarray] = {}
    model.optimizer.save_own_variables(store)
    optimizer.load_own_variables(store)
    cases.compiled_model(optimizer, model)
    assert_near(cases.train(model, STEPS), theirs.expected)


@pytest.mark.parametrize("extension", [".weights.h5", ".keras"])
def test_weights_of_keras_wait_for_build(extension, keras_run):
    case = BY_NAME["adam"]
    theirs = keras_run(case)
    model = cases.compiled_model(case.make(**SETTINGS))
    model.load_weights(f"{theirs.stem}{extension}")
    assert_near(cases.train(model, STEPS), theirs.expected)


def test_checkpoint_of_keras_waits_for_build(keras_run):
    case = BY_NAME["adam"]
    theirs = keras_run(case)
    model = cases.compiled_model(case.make(**SETTINGS))
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    status = checkpoint.read(f"{theirs.stem}.tf")
    cases.train(model, STEPS)
    status.assert_consumed()
    assert_near(model, theirs.expected)


@every_shared_case
def test_our_state_continues_in_keras(case, our_run, keras_run):
    ours, theirs = our_run(case), keras_run(case)
    theirs.model.load_weights(f"{ours.stem}.weights.h5")
    assert_identical(theirs.model, ours.halfway)
    assert_near(cases.train(theirs.model, STEPS), ours.expected)


SHARED = {
    "alone": {},
    "ema": {"use_ema": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "both": {"use_ema": True, "gradient_accumulation_steps": 2},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    },
}


@every_shared_case
@pytest.mark.parametrize("shared", SHARED)
def test_state_has_the_layout_of_keras(case, shared):
    def layout(make: Any) -> list[tuple]:
        optimizer = make(name="the_optimizer", **SHARED[shared])
        optimizer.build(cases.small_model().trainable_variables)
        return [(v.path, v.name, v.shape, v.dtype) for v in optimizer.variables]

    ours, theirs = layout(case.make), layout(case.keras)
    assert [x[2:] for x in ours] == [x[2:] for x in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        # Keras leaves one or the other without a name of its own.
        assert mine == other or re.fullmatch(r"variable(_\d+)?", other[1])


# ------------------------------------------------------------ what can't fit


MISMATCHES = {
    "momentum missing": (lambda: tf_effopt.SGD(), lambda: tf_effopt.SGD(momentum=0.9)),
    "momentum added": (lambda: tf_effopt.SGD(momentum=0.9), lambda: tf_effopt.SGD()),
    "amsgrad missing": (lambda: tf_effopt.Adam(), lambda: tf_effopt.Adam(amsgrad=True)),
    "other class": (lambda: tf_effopt.Adam(), lambda: tf_effopt.SGD()),
    "average": (lambda: tf_effopt.Adam(use_ema=True), lambda: tf_effopt.Adam()),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_state_of_other_settings_is_refused(mismatch, built):
    make, make_saved = MISMATCHES[mismatch]
    saved, optimizer = make_saved(), make()
    saved.build(cases.small_model().trainable_variables)
    saved.iterations.assign(5)  # As if it had trained.
    variables = cases.small_model().trainable_variables
    if built:
        optimizer.build(variables)
    before = arrays(optimizer.variables)
    store: dict[str, np.ndarray] = {}
    saved.save_own_variables(store)
    numbers = f"{len(saved.variables)} variables.*"
    with pytest.raises(ValueError, match=numbers + "momentum, amsgrad, use_ema"):
        optimizer.load_own_variables(store)
        optimizer.build(variables)
    if built:
        for value, variable in zip(before, optimizer.variables, strict=True):
            np.testing.assert_array_equal(variable.numpy(), value)


def test_state_of_another_model_is_refused(tmp_path):
    saved = cases.compiled_model(tf_effopt.Adam())
    saved.optimizer.build(saved.trainable_variables)
    store: dict[str, np.ndarray] = {}
    saved.optimizer.save_own_variables(store)
    optimizer = tf_effopt.Adam()
    optimizer.build(
        [keras.Variable(np.ones(shape)) for shape in [(4, 3), 3, (3, 1), 2]]
    )
    with pytest.raises(ValueError, match=r"number 6: \[\(3, 2\)\] saved"):
        optimizer.load_own_variables(store)


def test_file_of_other_settings_is_refused(tmp_path):
    saved = cases.compiled_model(tf_effopt.SGD(momentum=0.9))
    saved.optimizer.build(saved.trainable_variables)
    saved.save_weights(tmp_path / "saved.weights.h5")
    model = cases.compiled_model(tf_effopt.Adam())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="doesn't fit"):
        model.load_weights(tmp_path / "saved.weights.h5")


# ------------------------------------------------------------------- copies

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copy_before_build_is_independent(how):
    optimizer = tf_effopt.Adam(0.125, beta_1=0.5, clipnorm=1.0)
    copied = COPIES[how](optimizer)
    assert copied.get_config() == optimizer.get_config()
    copied.beta_1, copied.learning_rate = 0.75, 0.5
    assert optimizer.beta_1 == 0.5 and float(optimizer.learning_rate) == 0.125
    first, second = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer.apply([np.ones(1, "float32")], [first])
    copied.apply([np.ones(1, "float32")], [second])
    values = [first.numpy()[0], second.numpy()[0]]
    np.testing.assert_allclose(values, [0.875, 0.5], rtol=1e-5)  # epsilon / sqrt(v)


def test_deepcopy_after_build_continues_independently():
    variable = keras.Variable([1.0, 2.0])
    optimizer = tf_effopt.SGD(0.5, momentum=0.5)
    gradient = np.ones(2, "float32")
    optimizer.apply([gradient], [variable])
    copied = copy.deepcopy(optimizer)
    assert int(copied.iterations) == 1
    copied.apply([gradient], [variable])  # 0.5 - (0.25 + 0.5)
    np.testing.assert_array_equal(variable.numpy(), [-0.25, 0.75])
    copied.apply([gradient], [variable])  # -0.25 - (0.375 + 0.5)
    np.testing.assert_array_equal(variable.numpy(), [-1.125, -0.125])
    # The original's velocity didn't move: -1.125 - (0.25 + 0.5).
    assert int(optimizer.iterations) == 1
    optimizer.apply([gradient], [variable])
    np.testing.assert_array_equal(variable.numpy(), [-1.875, -0.875])


def test_pickle_after_build_keeps_the_state_until_it_is_built_again():
    optimizer = tf_effopt.SGD(0.5, momentum=0.5)
    variable, gradient = keras.Variable([1.0]), np.ones(1, "float32")
    optimizer.apply([gradient], [variable])
    loaded = pickle.loads(pickle.dumps(optimizer))
    loaded.apply([gradient], [variable])
    np.testing.assert_array_equal(variable.numpy(), [-0.25])
    assert int(loaded.iterations) == 2 and int(optimizer.iterations) == 1


@pytest.mark.parametrize("how", COPIES)
def test_copy_of_a_model_continues_bit_identically(how, our_run):
    model = our_run(BY_NAME["amsgrad"]).model
    before = everything(model)
    copied = COPIES[how](model)
    copied.compile(copied.optimizer, loss="mse", jit_compile=False)
    cases.train(copied, STEPS)
    assert_identical(model, before)
    cases.train(model, STEPS)
    assert_identical(copied, everything(model))


def test_deepcopy_of_a_list_of_variables_and_their_optimizer():
    variable = keras.Variable([1.0])
    optimizer = tf_effopt.SGD(0.5, momentum=0.5)
    optimizer.apply([np.ones(1, "float32")], [variable])
    copied_variable, copied = copy.deepcopy([variable, optimizer])
    copied.apply([np.ones(1, "float32")], [copied_variable])
    np.testing.assert_array_equal(copied_variable.numpy(), [-0.25])
    np.testing.assert_array_equal(variable.numpy(), [0.5])


# ------------------------------------------------------ numbers of the model


def test_estimate_of_prodigy_grows_and_is_saved(tmp_path):
    def estimate(model: keras.Model) -> float:
        variables = model.optimizer.variables
        (value,) = [v.numpy() for v in variables if v.name == "estimate"]
        return float(value)

    model = cases.compiled_model(tf_effopt.Prodigy(initial_estimate=1e-4))
    estimates = [estimate(cases.train(model, 2)) for _ in range(8)]
    assert all(b >= a for a, b in itertools.pairwise(estimates))
    assert 1e-4 < estimates[0] < estimates[1] < estimates[-1]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert estimate(loaded) == estimates[-1]
    fresh = cases.compiled_model(tf_effopt.Prodigy(initial_estimate=1e-4))
    fresh.optimizer.build(fresh.trainable_variables)
    assert estimate(fresh) == pytest.approx(1e-4)


def test_a_whole_moment_of_version_0_1_0_is_factored():
    """It kept that of a 2 x 2 matrix whole."""
    rng = np.random.default_rng(0)
    shapes = [(2, 2), (3,), (4, 3), (2, 2)]
    kept = [(2, 2), (3,), (4,), (3,), (2, 2)]
    values = [rng.uniform(size=shape).astype("float32") for shape in kept]
    optimizer = tf_effopt.Adafactor(0.1)
    optimizer.build([keras.Variable(np.ones(shape)) for shape in shapes])
    state = [np.array(3), np.array(0.1, "float32"), *values]
    optimizer.load_own_variables({str(i): x for i, x in enumerate(state)})
    first, last = values[0], values[-1]
    expected = [first.mean(1), first.mean(0), *values[1:4], last.mean(1), last.mean(0)]
    for variable, value in zip(optimizer.variables[2:], expected, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_a_loss_scale_that_was_loaded_goes_on_where_fit_builds(tmp_path):
    def new_model():
        optimizer = tf_effopt.LossScaleOptimizer(
            tf_effopt.SGD(0.1), dynamic_growth_steps=50
        )
        return cases.compiled_model(optimizer)

    whole = cases.train(new_model(), 3)
    whole.save_weights(tmp_path / "w.weights.h5")
    cases.train(whole, 2)
    again = new_model()
    again.load_weights(tmp_path / "w.weights.h5")
    cases.train(again, 2)
    assert int(again.optimizer.step_counter.numpy()) == 5
    again.optimizer.build(again.trainable_variables)  # changes nothing
    for mine, other in zip(
        again.optimizer.variables, whole.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(mine.numpy(), other.numpy())


def test_what_replicas_exchange_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = tf_effopt.Muon(1e-3)
    tf_effopt.distribute.compress_gradients(optimizer, "float16")
    tf_effopt.distribute.divide_matrix_work(optimizer)
    model.compile(optimizer, "mse")
    model.save(path := tmp_path / "model.keras")
    chosen = {"gradient_dtype": "float16", "divides_matrices": True}
    loaded = keras.models.load_model(path).optimizer
    again = tf_effopt.Muon.from_config(optimizer.get_config())
    for other in (loaded, again, copy.deepcopy(optimizer)):
        assert vars(other._engine.communication) == chosen
        assert other.get_config()["communication"] == chosen
    assert "communication" not in tf_effopt.Muon(1e-3).get_config()
