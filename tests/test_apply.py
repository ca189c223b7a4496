"""What `apply` and `build` take, and what a step does in odd circumstances."""

from __future__ import annotations

import copy
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import X, Y, arrays, compiled_model, small_model, train

import tf_effopt
from tf_effopt import SGD, Adam, AdamW, LossScaleOptimizer

pytestmark = pytest.mark.versions


def variable(*values, **kwargs):
    return keras.Variable(np.array(values, "float32"), **kwargs)


# ------------------------------------------------------------------------ inputs


def test_gradients_may_be_plain_numbers():
    w = variable(1.0, 2.0)
    SGD(1.0).apply([[1.0, 1.0]], [w])
    assert w.numpy().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("gradient", [[1.0], 1.0, [[1.0, 1.0]], np.ones(3)])
def test_a_gradient_of_another_shape_is_refused(gradient):
    w = variable(1.0, 2.0)
    with pytest.raises(ValueError, match=r"must have its shape \(2,\)"):
        SGD(1.0).apply([gradient], [w])
    assert w.numpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "gradient", ["a", {"a": 1}, tf.constant([True]), tf.constant([1j])]
)
def test_what_is_no_gradient_is_refused(gradient):
    with pytest.raises(ValueError, match="must be a tensor of real numbers"):
        SGD(1.0).apply([gradient], [variable(1.0)])


def test_gradients_must_be_a_list():
    for grads in (None, tf.ones(1), 1.0):
        with pytest.raises(ValueError, match="`grads` must be a list"):
            SGD(1.0).apply(grads, [variable(1.0)])


def test_variables_must_be_a_list_of_variables():
    model = small_model()
    for variables in (model, ["w"], [np.ones(1)], model.weights[0], None, 1):
        with pytest.raises(ValueError, match="must be a list of variables"):
            SGD().build(variables)
    with pytest.raises(ValueError, match="must be a list of variables"):
        SGD().apply([tf.ones(1)], variable(1.0))


def test_a_variable_given_twice_is_refused():
    """The advice gives the right step: the gradient is the sum over both uses."""
    w = variable(1.0, name="twice")
    with tf.GradientTape() as tape:
        loss = 3.0 * w + w * w
    gradients = tape.gradient(loss, [w, w])
    advice = "list it once, with the gradient that `tape.gradient`.*twice"
    with pytest.raises(ValueError, match=advice) as caught:
        SGD(0.1).apply(gradients, [w, w])
    assert "add up" not in str(caught.value)
    SGD(0.1).apply(gradients[:1], [w])
    np.testing.assert_allclose(w.numpy(), [1.0 - 0.1 * (3.0 + 2.0)], rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: Adam(0.1), lambda: LossScaleOptimizer(Adam(0.1))]
)
def test_no_gradients_and_no_variables_are_nothing_to_do(make):
    w, optimizer = variable(1.0), make()
    before = arrays(optimizer.variables)
    for nothing in (([], []), ((), ()), ([],), ([], None)):
        optimizer.apply(*nothing)
    optimizer.build([])
    assert not optimizer.built
    for a, b in zip(before, arrays(optimizer.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    scale = float(optimizer.scale_loss(1.0))
    optimizer.apply([tf.constant([2.0 * scale])], [w])
    optimizer.apply([], [])
    np.testing.assert_allclose(w.numpy(), [0.9], rtol=1e-5)
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize("grads, count", [([], 1), ([1.0], 0)])
def test_gradients_of_other_variables_than_given_are_refused(grads, count):
    with pytest.raises(ValueError, match=f"{len(grads)} gradients for {count} var"):
        SGD().apply(grads, [variable(1.0)] * count)


def test_rows_need_no_dense_shape():
    w = keras.Variable(np.ones((4, 2), "float32"))
    rows = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([2, 2]))
    SGD(0.25).apply([rows], [w])
    assert w.numpy()[:, 0].tolist() == [1.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "indices",
    [(2, 0, 2), [2, 0, 2], np.array([2, 0, 2], "uint8"), tf.constant([2, 0, 2])],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize(
    "dense_shape",
    [(4, 2), [4, 2], np.array([4, 2]), tf.TensorShape([None, 2]), None],
    ids=lambda x: type(x).__name__,
)
def test_the_parts_of_rows_need_not_be_tensors(lazy, indices, dense_shape):
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    optimizer = LossScaleOptimizer(SGD(0.5, lazy=lazy), initial_scale=1.0)
    w = keras.Variable(np.ones((4, 2), "float32"))
    right = np.ones((4, 2))
    np.subtract.at(right, [2, 0, 2], 0.5 * values)
    kinds = values.astype("float32"), values.tolist(), list(tf.constant(values))
    values = kinds[len(str(dense_shape)) % 3]
    optimizer.apply([tf.IndexedSlices(values, indices, dense_shape)], [w])
    np.testing.assert_allclose(w.numpy(), right, rtol=1e-6)


@pytest.mark.parametrize(
    "values", [np.ones((1, 2)), [[1.0, 1.0]], (tf.ones(2),)], ids=["array", "list", ""]
)
def test_the_values_of_rows_in_a_graph(values):
    w = keras.Variable(np.ones((3, 2), "float32"))
    optimizer = Adam(0.1)

    @tf.function
    def step():
        optimizer.apply([tf.IndexedSlices(values, (1,), (3, 2))], [w])

    step()
    np.testing.assert_allclose(w.numpy()[:, 0], [1.0, 0.9, 1.0], rtol=1e-6)


def test_no_rows_at_all():
    w = keras.Variable(np.ones((3, 2), "float32"))
    SGD(0.5).apply([tf.IndexedSlices(np.ones((0, 2), "float32"), (), (3, 2))], [w])
    np.testing.assert_array_equal(w.numpy(), np.ones((3, 2)))


def test_elements_instead_of_rows():
    w = keras.Variable(np.ones((2, 2), "float32"))
    elements = tf.SparseTensor([[1, 0], [0, 1], [1, 0]], [1.0, 2.0, 3.0], (2, 2))
    for optimizer in (SGD(0.5), LossScaleOptimizer(SGD(0.5), initial_scale=1.0)):
        optimizer.apply([elements], [w])
    np.testing.assert_allclose(w.numpy(), [[1.0, -1.0], [-3.0, 1.0]])


@pytest.mark.parametrize(
    ("values", "indices", "shape", "message"),
    [
        (np.ones((1, 3)), (0,), None, r"must have its shape \(4, 2\).*rows"),
        (np.ones((1, 2)), (0,), (5, 2), r"must have its shape \(4, 2\).*\(5, 2\)"),
        (np.ones((1, 2)), (0.5,), (4, 2), "must be integers"),
        ([["a", "b"]], (0,), (4, 2), "must be a tensor of real numbers"),
    ],
)
def test_rows_that_do_not_fit_are_refused(values, indices, shape, message):
    w = keras.Variable(np.ones((4, 2), "float32"))
    with pytest.raises(ValueError, match=message):
        SGD(1.0).apply([tf.IndexedSlices(values, indices, shape)], [w])


def test_a_gradient_whose_rank_only_the_graph_knows():
    w = variable(3.0, 4.0)
    optimizer = SGD(1.0, clipnorm=1.0)
    optimizer.build([w])

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def step(gradient):
        optimizer.apply([gradient], [w])

    step(tf.constant([3.0, 4.0]))
    np.testing.assert_allclose(w.numpy(), [2.4, 3.2], rtol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.ones(1))


# ---------------------------------------------------- variables whose shape may change


def of_open_shape(values, shape, dtype="float32"):
    values = tf.cast(np.array(values), dtype)
    return tf.Variable(values, shape=tf.TensorShape(shape), name="points")


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("shape", [[None], None], ids=str)
def test_a_variable_of_open_shape_by_the_formulas(shape, in_graph):
    """SGD with momentum and Adam in float64."""
    g, w0 = np.array([0.5, 2.0]), np.array([1.0, -2.0])
    makes = (lambda: SGD(0.1, momentum=0.9), lambda: Adam(0.1))
    for make, right in zip(
        makes, [w0 - 0.1 * g * (1 + 1.9), w0 - 0.2 * np.sign(g)], strict=True
    ):
        w, optimizer = of_open_shape(w0, shape), make()

        def step(gradient, w=w, optimizer=optimizer):
            optimizer.apply([gradient], [w])

        step = tf.function(step) if in_graph else step
        for _ in range(2):
            step(tf.constant(g, "float32"))
        np.testing.assert_allclose(w.numpy(), right, rtol=1e-5)
        assert optimizer.describe().count("(2,)") == 1


@pytest.mark.parametrize(
    ("dtype", "make"),
    [
        ("float32", lambda: tf_effopt.Muon(0.1)),
        ("float32", lambda: tf_effopt.Adafactor(0.1)),
        (
            "bfloat16",
            lambda: AdamW(
                0.1,
                use_ema=True,
                clipnorm=0.1,
                gradient_accumulation_steps=2,
                transforms=[tf_effopt.transforms.GradientCentralization()],
            ),
        ),
        ("bfloat16", lambda: Adam(0.1, lazy=True)),
        ("float32", lambda: tf_effopt.ScheduleFreeAdamW(0.1)),
    ],
)
def test_open_and_full_shapes_train_alike(dtype, make):
    start = np.random.default_rng(0).normal(size=(4, 3))
    results = []
    for shape in (None, [4, 3]):
        w, optimizer = of_open_shape(start, shape, dtype), make()
        rows = tf.IndexedSlices(tf.ones((2, 3)), tf.constant([0, 2]))
        for gradient in (rows, rows, rows if optimizer.lazy else tf.ones((4, 3))):
            optimizer.apply([gradient], [w])
        results.append(
            [tf.cast(v, "float64").numpy() for v in [w, *optimizer.variables]]
        )
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_variable_that_has_grown_is_refused():
    w, optimizer = of_open_shape([1.0, 2.0], [None]), Adam(0.1)
    optimizer.apply([tf.ones(2)], [w])
    w.assign([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"points.*now it is \(3,\).*new optimizer"):
        optimizer.apply([tf.ones(3)], [w])
    type(optimizer).from_config(optimizer.get_config()).apply([tf.ones(3)], [w])
    np.testing.assert_allclose(w.numpy(), [0.9, 1.9, 2.9], rtol=1e-6)


# ----------------------------------------------------------------- what isn't finite


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_not_finite_changes_nothing(rate):
    w = variable(1.0)
    optimizer = Adam(lambda: rate)
    optimizer.apply([tf.ones(1)], [w])
    assert w.numpy().tolist() == [1.0]
    assert optimizer.skipped_steps == 1
    assert int(optimizer.iterations) == 0


def test_an_accumulator_that_overflowed_is_empty_after_the_update():
    w = variable(1.0)
    optimizer = SGD(1e-30, gradient_accumulation_steps=2, clipvalue=1.0)
    for g in (2e38, 2e38, 1.0, 1.0):
        optimizer.apply([tf.constant([g])], [w])
    assert np.isfinite(optimizer._accumulated_gradients[0].numpy()).all()
    assert np.isfinite(w.numpy()).all()


def test_fit_warns_of_new_skipped_steps_only():
    model = compiled_model(SGD(0.01))
    bad = X.copy()
    bad[3] = np.nan
    with pytest.warns(UserWarning, match="1 steps"):
        model.fit(bad, Y, batch_size=4, verbose=0, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(X, Y, batch_size=4, verbose=0)


# ------------------------------------------------------------- while it is training


def test_learning_rate_may_be_set_to_a_tensor_in_a_train_step():
    class Model(keras.Sequential):
        def train_step(self, data):
            steps = tf.cast(self.optimizer.iterations, "float32")
            self.optimizer.learning_rate = 0.1 / (1.0 + steps)
            return super().train_step(data)

    model = compiled_model(SGD(0.1), Model([keras.Input((4,)), keras.layers.Dense(2)]))
    model.fit(X, Y, batch_size=4, verbose=0)
    np.testing.assert_allclose(model.optimizer.learning_rate, 0.1 / 4, rtol=1e-6)


def test_changing_the_loss_scale_changes_no_step():
    same, changed = (compiled_model(SGD(0.01, loss_scale_factor=4.0)) for _ in range(2))
    for model in (same, changed):
        train(model, 2)
    changed.optimizer.loss_scale_factor = 512.0
    for model in (same, changed):
        train(model, 3)
    for a, b in zip(arrays(same.weights), arrays(changed.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_constraint_that_xla_cannot_run_may_come_in_a_later_step():
    def through_text(w):
        return tf.reshape(tf.strings.to_number(tf.strings.as_string(w)), w.shape)

    a, b = variable(1.0), variable(1.0)
    b.constraint = through_text
    optimizer = SGD(0.5)
    optimizer.build([a, b])
    optimizer.apply([tf.ones(1)], [a])
    optimizer.apply([tf.ones(1)], [b])
    assert a.numpy() == b.numpy() == 0.5


def test_a_constraint_need_not_be_hashable():
    class Unhashable(keras.constraints.Constraint):
        __hash__ = None

        def __call__(self, w):
            return keras.ops.maximum(w, 0.0)

    w = variable(1.0)
    w.constraint = Unhashable()
    SGD(3.0).apply([tf.ones(1)], [w])
    assert w.numpy() == 0.0


def test_averages_replace_only_what_is_trained_now():
    model = compiled_model(SGD(0.1, use_ema=True, ema_momentum=0.9))
    train(model, 5)
    model.layers[1].trainable = False
    compiled_model(model.optimizer, model)
    before = arrays(model.layers[1].weights)
    moved = arrays(model.layers[0].weights)
    model.fit(X, Y, verbose=0)
    for was, now in zip(before, arrays(model.layers[1].weights), strict=True):
        np.testing.assert_array_equal(was, now)
    assert not np.array_equal(moved[0], model.layers[0].get_weights()[0])


def step_by_a_flag(w, chosen, traces=()):
    @tf.function
    def step(flag):
        if traces != ():
            traces.append(flag)
        with tf.GradientTape() as tape:
            loss = chosen[flag].scale_loss(w * w)
        chosen[flag].apply(tape.gradient(loss, [w.value]), [w])

    return step


@pytest.mark.parametrize("built", [(), (True,), (False,), (True, False)], ids=str)
def test_two_optimizers_by_a_flag_in_one_function(built):
    """The second is built when the function is traced for a second time."""
    w = variable(1.0)
    rates = {True: 0.1, False: 0.01}
    chosen = {flag: SGD(r, momentum=0.9) for flag, r in rates.items()}
    for flag in built:
        chosen[flag].build([w])
    step = step_by_a_flag(w, chosen, traces := [None])
    right, momenta = 1.0, dict.fromkeys(rates, 0.0)
    for flag in (True, False, True, True, False):
        step(flag)
        momenta[flag] = 0.9 * momenta[flag] - rates[flag] * 2.0 * right
        right += momenta[flag]
    np.testing.assert_allclose(w.numpy(), [right], rtol=1e-5)
    assert traces == [None, True, False]


def test_a_function_that_trains_by_a_flag_in_a_loop_or_branch():
    """It doesn't in its first trace, so that the optimizer is built in a later one."""
    w, optimizer = variable(1.0), SGD(0.1, momentum=0.9)

    def train():
        optimizer.apply([2.0 * w.value], [w])
        return tf.constant(0)

    @tf.function
    def step(trains, steps):
        if trains:
            tf.cond(steps > 0, train, lambda: tf.constant(0))
            for _ in tf.range(steps - 1):
                train()

    right, m = 1.0, 0.0
    for trains in (False, True, False, True):
        step(trains, tf.constant(3))
        for _ in range(3 if trains else 0):
            m = 0.9 * m - 0.1 * 2.0 * right
            right += m
    np.testing.assert_allclose(w.numpy(), [right], rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [lambda: LossScaleOptimizer(SGD(0.1)), lambda: SGD(0.1, loss_scale_factor=4.0)],
)
def test_a_later_trace_keeps_no_loss_scale(make):
    """Else the loss would have the scale of then, and the step that of now."""
    w, chosen = variable(1.0), {flag: make() for flag in (True, False)}
    step = step_by_a_flag(w, chosen)
    step(True)
    with pytest.raises(ValueError, match="scale_loss.*build.*before the function"):
        step(False)
    chosen[False] = make()
    chosen[False].build([w])
    step(False)
    np.testing.assert_allclose(w.numpy(), [0.8**2], rtol=1e-6)


# ------------------------------------------------------------------ weight decay


def test_an_exact_path_excludes_that_variable_only():
    inner, outer = variable(1.0, name="kernel"), variable(1.0, name="kernel")
    inner._path, outer._path = "block/dense/kernel", "dense/kernel"
    optimizer = AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=["dense/kernel"])
    optimizer.apply([tf.zeros(1)] * 2, [inner, outer])
    np.testing.assert_allclose([*inner.numpy(), *outer.numpy()], [0.95, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"var_names": "bias"}, "must be lists"),
        ({"var_list": "dense/bias"}, "must be lists"),
        ({"var_list": variable(1.0)}, "must be lists"),
        ({"var_names": ["("]}, "regular expressions"),
    ],
)
def test_wrong_exclusions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamW().exclude_from_weight_decay(**arguments)


# ------------------------------------------------------------------ loss scaling


def test_loss_scaling_hands_exclusions_to_the_inner_optimizer():
    optimizer = LossScaleOptimizer(SGD(1.0, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    w = variable(1.0, name="bias")
    optimizer.apply([tf.zeros(1)], [w])
    assert w.numpy() == 1.0


def test_a_copy_of_loss_scaling_has_its_state():
    model = compiled_model(LossScaleOptimizer(Adam(0.01), initial_scale=8.0))
    train(model, 3)
    for other in (
        copy.deepcopy(model.optimizer),
        model.optimizer.carry_over(model.trainable_variables),
    ):
        for a, b in zip(
            arrays(model.optimizer.variables), arrays(other.variables), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossScaleOptimizer(SGD(), initial_scale=-1), "initial_scale=-1"),
        (lambda: LossScaleOptimizer(SGD(), initial_scale=np.nan), "initial_scale=nan"),
        (lambda: LossScaleOptimizer(SGD(), dynamic_growth_steps=0), "growth_steps=0"),
        (lambda: LossScaleOptimizer("adam"), "inner_optimizer='adam'"),
        (lambda: LossScaleOptimizer(None), "inner_optimizer=None"),
        (lambda: LossScaleOptimizer(SGD()).apply([tf.ones(1)]), "was built"),
    ],
)
def test_wrong_use_of_loss_scaling_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adam(beta_1=np.array("0.5")),
        lambda: Adam(epsilon=np.complex64(1 + 1j)),
        lambda: Adam(learning_rate=np.array(True)),
        lambda: Adam(epsilon=10**400),
        lambda: Adam(epsilon=1e-60),
        lambda: SGD(1e40),
        lambda: SGD(clipnorm=1e-40),
    ],
)
def test_what_is_no_number_in_float32_is_refused(make):
    with pytest.raises(ValueError, match="Received"):
        make()


def test_integers_of_numpy_are_integers():
    optimizer = SGD(
        use_ema=True,
        ema_overwrite_frequency=np.int64(3),
        gradient_accumulation_steps=np.int64(2),
    )
    assert optimizer.ema_overwrite_frequency == 3


def test_a_custom_rule_that_takes_what_nothing_provides():
    def rule(g, slots, *, beta):
        return -beta * g, slots

    class Custom(tf_effopt.Optimizer):
        def __init__(self, beta=0.9, **kwargs):
            super().__init__(**kwargs)
            self.beta = beta

    Custom.rule = staticmethod(rule)
    with pytest.raises(TypeError, match="takes `beta`, which nothing provides"):
        Custom().apply([tf.ones(1)], [variable(1.0)])


def test_a_number_that_no_model_rule_returns_is_named():
    def rule(g, slots, *, learning_rate, correcton):
        return -learning_rate * correcton * g, slots

    class Custom(tf_effopt.Adam):
        pass

    Custom.rule = staticmethod(rule)
    with pytest.raises(TypeError, match="Did you mean `correction`"):
        Custom().build([variable(1.0)])


def misspelt_in(place: str) -> tf_effopt.Optimizer:
    """An optimizer with a model rule, of which one function asks for `scal`."""

    def total(g, slots, *, old):
        return {"total": old * tf.reduce_sum(g)}

    def misspelt_total(g, slots, *, ol):
        return {"total": ol * tf.reduce_sum(g)}

    def model(sums, slots, *, t):
        return {"scale": 1.0 / (sums["total"] + t)}, slots

    def rule(g, slots, *, learning_rate, scale):
        return -learning_rate * scale * g, slots

    def misspelt_rule(g, slots, *, learning_rate, scal):
        return -learning_rate * scal * g, slots

    def misspelt_upkeep(gs, slots, *, scal):
        return slots

    class Custom(tf_effopt.Optimizer):
        model_rule = tf_effopt.rules.ModelRule(
            model,
            slots={"old": ("old", 1.0)},
            measure=misspelt_total if place == "measure" else total,
        )

    Custom.rule = staticmethod(misspelt_rule if place == "rule" else rule)
    if place == "upkeep":
        Custom.upkeep = staticmethod(misspelt_upkeep)
    return Custom()


@pytest.mark.parametrize(
    ("place", "nearest"), [("rule", "scale"), ("measure", "old"), ("upkeep", "scale")]
)
def test_a_misspelt_number_of_the_model_is_an_error_at_build(place, nearest):
    with pytest.raises(TypeError, match=f"Did you mean `{nearest}`"):
        misspelt_in(place).build([variable(1.0), variable(1.0)])


def test_correct_names_are_none():
    misspelt_in("nowhere").build([variable(1.0)])


def test_a_rule_that_fails_otherwise_fails_at_its_first_step():
    def model(sums, slots):
        return {"scale": 1.0}, slots

    def rule(g, slots, *, scale):
        raise ZeroDivisionError("of the rule")

    class Custom(tf_effopt.Optimizer):
        model_rule = tf_effopt.rules.ModelRule(model)

    Custom.rule = staticmethod(rule)
    optimizer, w = Custom(), variable(1.0)
    optimizer.build([w])
    with pytest.raises(Exception, match="of the rule"):
        optimizer.apply([tf.ones(1)], [w])


@pytest.mark.parametrize(
    "make", [lambda: SGD(use_ema=True), tf_effopt.Prodigy, tf_effopt.ScheduleFreeAdamW]
)
def test_weights_that_are_made_within_the_step(make):
    """The average starts at the weights, which have no value when it is made."""

    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(1, name="inner")

        def build(self, shape):
            """Without its layers."""

        def call(self, x):
            return self.inner(x)

    def late():
        model = Late()
        model.build((None, X.shape[1]))
        model.compile(make(), "mse", jit_compile=False)
        return model

    results = []
    for is_called_before in (False, True):
        keras.utils.set_random_seed(1)
        model = late()
        if is_called_before:
            model(X[:1])
        model.fit(X, Y, verbose=0)
        results.append(model.get_weights())
    for late_weights, weights in zip(*results, strict=True):
        np.testing.assert_allclose(late_weights, weights, rtol=1e-6)
