"""Stages on what a replica sends; with several replicas in test_mirrored.py."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import arrays, compiled_model, train
from cases import weights_after as steps

import tf_effopt
from tf_effopt import SGD, Adam, Stage, hyperparameters
from tf_effopt.rules import ModelRule, Slots


def rounded(g, slots, *, unit):
    """To a multiple of `unit`; what is lost comes in the next step."""
    total = g + slots["error"]
    x = keras.ops.round(total / unit) * unit
    return x, {"error": total - x}


class ErrorFeedback(Stage):
    where = "sent"
    slots = Slots(error="error")
    function = staticmethod(rounded)
    unit: float = hyperparameters.Positive(default=1.0)


def rounding(**options):
    return SGD(1.0, transforms=[ErrorFeedback()], **options)


def test_what_is_lost_comes_later():
    assert steps(rounding(), [0.4, 0.4, 0.4]) == [0.0, -1.0, -1.0]
    # Errors 0.4, -0.2, 0.2.
    optimizer = rounding()
    steps(optimizer, [0.4, 0.4, 0.4])
    assert optimizer.variables[-1].numpy() == pytest.approx(0.2, abs=1e-6)
    assert optimizer.variables[-1].path.endswith("error")


@pytest.mark.parametrize(
    "run_eagerly, jit_compile", [(True, False), (False, False), (False, True)]
)
def test_the_ways_agree(run_eagerly, jit_compile):
    def trained(**options):
        optimizer = Adam(0.1, transforms=[ErrorFeedback(unit=0.25)])
        model = compiled_model(optimizer)
        model.compile(optimizer, "mse", **options)
        train(model, 4)
        return arrays([*model.weights, *optimizer.variables])

    options = {"run_eagerly": run_eagerly, "jit_compile": jit_compile}
    usual = trained(jit_compile=False)
    for x, y in zip(usual, trained(**options), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_taken_leaves_the_slots():
    optimizer = rounding()
    w = keras.Variable([0.0])
    for g in (0.4, np.nan, np.inf):
        optimizer.apply([tf.constant([g])], [w])
    np.testing.assert_array_equal(optimizer.variables[-1].numpy(), np.float32([0.4]))
    assert optimizer.skipped_steps == 2
    optimizer.apply([tf.constant([0.2])], [w])
    assert w.numpy() == -1.0


def test_it_sees_each_micro_step():
    # 0.4 -> 0; 0.4 + 0.4 -> 1; the mean is 0.5.
    optimizer = rounding(gradient_accumulation_steps=2)
    assert steps(optimizer, [0.4, 0.4]) == [0.0, -0.5]


def test_it_sees_the_gradient_before_clipping_and_transforms():
    optimizer = SGD(
        1.0,
        clipvalue=0.25,
        transforms=[tf_effopt.transforms.Cautious(), ErrorFeedback()],
    )
    assert steps(optimizer, [0.4, 0.4]) == [0.0, -0.25]


def test_it_sees_the_gradient_of_the_loss():
    optimizer = rounding(loss_scale_factor=4.0)
    w = keras.Variable([0.0])
    optimizer.apply([tf.constant([1.6])], [w])  # of a loss times 4: 0.4
    optimizer.loss_scale_factor = 2.0
    optimizer.apply([tf.constant([0.4])], [w])
    assert w.numpy() == -1.0


def test_a_number_changes_without_a_trace():
    stage = ErrorFeedback()
    optimizer = SGD(1.0, transforms=[stage])
    w = keras.Variable([0.0])
    optimizer.apply([tf.constant([0.4])], [w])
    stage.unit = 0.25
    optimizer.apply([tf.constant([0.4])], [w])
    assert w.numpy() == -0.75


def test_variables_without_a_gradient_keep_their_slots():
    optimizer = rounding()
    v, w = keras.Variable([0.0]), keras.Variable([0.0])
    for gradients in ([0.4, 0.4], [0.4], [None, 0.4]):
        pairs = zip(gradients, (v, w), strict=False)
        given = [(tf.constant([g]), x) for g, x in pairs if g is not None]
        optimizer.build([v, w])
        optimizer.apply(*zip(*given, strict=True))
    assert v.numpy() == w.numpy() == -1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_other_dtypes(dtype):
    w = keras.Variable([0.0], dtype=dtype)
    optimizer = rounding()
    for _ in range(2):
        optimizer.apply([tf.constant([0.4], dtype)], [w])
    assert float(w.numpy()[0]) == -1.0
    kept = optimizer.variables[-1]
    assert kept.dtype == ("float64" if dtype == "float64" else "float32")
    assert float(kept.numpy()[0]) == pytest.approx(-0.2, abs=2e-3)


def test_it_may_send_another_dtype():
    def narrowed(g, slots):
        x = keras.ops.cast(g + slots["error"], "bfloat16")
        return x, {"error": g + slots["error"] - keras.ops.cast(x, g.dtype)}

    Narrow = type(
        "Narrow",
        (Stage,),
        {
            "where": "sent",
            "slots": {"error": "error"},
            "function": staticmethod(narrowed),
        },
    )
    optimizer = SGD(1.0, transforms=[Narrow()])
    w = keras.Variable([0.0])
    optimizer.apply([tf.constant([1.001])], [w])
    assert w.numpy() == -1.0
    np.testing.assert_allclose(optimizer.variables[-1].numpy(), [0.001], rtol=1e-3)


def test_embeddings_send_whole_tensors():
    table = keras.Variable(np.zeros((3, 2), "float32"))
    rows = tf.IndexedSlices(
        tf.fill((2, 2), 0.4), tf.constant([1, 1]), tf.constant([3, 2])
    )
    rounding().apply([rows], [table])
    assert table.numpy().tolist() == [[0.0, 0.0], [-1.0, -1.0], [0.0, 0.0]]


def test_lazy_rows_are_refused():
    with pytest.raises(ValueError, match="`lazy=True` can't be combined"):
        rounding(lazy=True)


def test_saved_and_carried_over(tmp_path):
    optimizer = Adam(0.1, transforms=[ErrorFeedback(unit=0.25)])
    model = compiled_model(optimizer)
    train(model, 4)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    other = optimizer.carry_over(model.trainable_variables)
    for copy in (loaded.optimizer, other):
        for x, y in zip(
            arrays(optimizer.variables), arrays(copy.variables), strict=True
        ):
            np.testing.assert_array_equal(x, y)
    assert any(np.any(v.numpy()) for v in optimizer.variables if "error" in v.path)


def test_the_scope_of_the_slots():
    assert ErrorFeedback().scope == "per_replica"
    assert tf_effopt.transforms.MARS().scope == "replicated"


def test_numbers_of_the_model_are_refused():
    with pytest.raises(TypeError, match="works on what one replica sends"):
        type(
            "Wrong", (ErrorFeedback,), {"model_rule": ModelRule(lambda sums, slots: 0)}
        )


# ----------------------------------------------------------------------- reports


def test_reports_are_slots_of_the_model_rule():
    with pytest.raises(
        TypeError, match="`reports` of Wrong .*seen, mean, skipped.*'x'"
    ):
        type("Wrong", (tf_effopt.transforms.SkipSpikes,), {"reports": ("x",)})
    with pytest.raises(TypeError, match="`reports` of Wrong .*it has none"):
        type("Wrong", (ErrorFeedback,), {"reports": ("error",)})


def test_stages_of_one_class_report_apart():
    skip = tf_effopt.transforms.SkipSpikes
    optimizer = SGD(
        1.0,
        transforms=[skip(100.0, warmup_steps=1), skip(2.0, warmup_steps=1)],
    )
    assert set(optimizer.reports().values()) == {0.0}
    steps(optimizer, [1.0, 3.0])
    found = optimizer.reports()
    assert found["SkipSpikes/skipped"] == 0.0
    assert found["SkipSpikes_2/skipped"] == 1.0
    assert SGD().reports() == {}
