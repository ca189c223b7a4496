"""What stands before and after a rule: against NumPy, saved, changed, skipped."""

from __future__ import annotations

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import (
    AVERAGES,
    BY_NAME,
    CASES,
    STAGES,
    TRANSFORMS,
    X,
    Y,
    arrays,
    by_name,
    compiled_model,
    small_model,
    traces,
    train,
)

from tf_effopt import SGD, Adam, averaging, transforms
from tf_effopt.runtime.programs import Program
from tf_effopt.state import random
from tf_effopt.transforms import (
    AdaptiveClipping,
    Cautious,
    GradientCentralization,
    GradientNoise,
    SkipSpikes,
    Transform,
    ZClip,
)

pytestmark = pytest.mark.fresh_programs

every_stage = pytest.mark.parametrize("name", STAGES)


def test_every_stage_is_in_the_table():
    classes = {type(make()).__name__ for make in TRANSFORMS.values()}
    assert classes | {"Transform"} == set(transforms.__all__)
    classes = {type(make()).__name__ for make in AVERAGES.values()}
    assert classes == set(averaging.__all__)


def steps(gradients, *transforms, optimizer=None, start=0.0):
    """The steps that SGD at rate 1 takes, one for each gradient."""
    w = keras.Variable(np.full(np.shape(gradients[0]), start), dtype="float32")
    optimizer = optimizer or SGD(1.0, transforms=list(transforms))
    taken = []
    for g in gradients:
        before = w.numpy()
        optimizer.apply([tf.constant(np.array(g, "float32"))], [w])
        taken.append(before - w.numpy())
    return taken


# -------------------------------------------------------------------- each formula


def test_adaptive_clipping_is_by_unit():
    """Brock et al. 2021, equation 3, for each column; g_i / |g_i| * c * |w_i|."""
    rng = np.random.default_rng(0)
    units = {
        (5, 3): (0,),
        (2, 3, 4, 5): (0, 1, 2),
        (4,): (0,),
        (1, 5): (0, 1),  # a vector, too, as the authors squeeze it
        (1, 1, 1, 5): (0, 1, 2, 3),
    }
    for shape, axes in units.items():
        w, g = rng.normal(size=shape), 3 * rng.normal(size=shape)
        size = np.sqrt((w**2).sum(axes, keepdims=True))
        norm = np.sqrt((g**2).sum(axes, keepdims=True))
        limit = 0.5 * np.maximum(size, 1e-3)
        expected = np.where(norm > limit, g * limit / norm, g)
        assert (norm > limit).any()
        variable = keras.Variable(w, dtype="float32")
        optimizer = SGD(1.0, transforms=[AdaptiveClipping(0.5)])
        optimizer.apply([tf.constant(g, "float32")], [variable])
        np.testing.assert_allclose(w - variable.numpy(), expected, atol=1e-6)


def test_adaptive_clipping_leaves_out_what_it_excludes():
    w = keras.Variable([1.0], name="head")
    SGD(1.0, transforms=[AdaptiveClipping(0.1, exclude=["head"])]).apply(
        [tf.constant([10.0])], [w]
    )
    assert w.numpy() == -9.0


def zclip(norms, threshold, decay, warmup):
    """The norms after ZClip, in float64, from the paper's section 3."""
    seen, mean, variance, clipped = [], 0.0, 0.0, []
    for norm in norms:
        if len(seen) < warmup:
            seen.append(norm)
            clipped.append(norm)
            mean, variance = np.mean(seen), np.var(seen)
            continue
        z = (norm - mean) / (np.sqrt(variance) + 1e-6)
        if z > threshold:
            norm = mean + threshold * np.sqrt(variance) * threshold / z
        clipped.append(norm)
        mean = decay * mean + (1 - decay) * norm
        variance = decay * variance + (1 - decay) * (norm - mean) ** 2
    return clipped


def test_zclip_follows_its_paper():
    rng = np.random.default_rng(1)
    norms = np.abs(rng.normal(size=60)) + 1.0
    norms[[20, 40]] = 100.0, 7.0
    directions = rng.normal(size=(60, 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    taken = steps(norms[:, None] * directions, ZClip(1.5, 0.9, warmup_steps=5))
    expected = zclip(norms, 1.5, 0.9, 5)
    assert sum(e < n for e, n in zip(expected, norms, strict=True)) > 3
    np.testing.assert_allclose(np.linalg.norm(taken, axis=1), expected, rtol=2e-5)


def test_noise_has_the_variance_of_its_paper():
    """Neelakantan et al. 2015, equation 1, at the first and the hundredth step."""
    zeros = np.zeros((100, 20000))
    taken = steps(zeros, GradientNoise(variance=0.3, gamma=0.55))
    for t in (1, 100):
        assert np.std(taken[t - 1]) == pytest.approx(np.sqrt(0.3 / t**0.55), rel=0.02)
        assert abs(np.mean(taken[t - 1])) < 0.02
    assert abs(np.corrcoef(taken[0], taken[1])[0, 1]) < 0.03


def test_noise_differs_by_seed_and_variable():
    def draw(variable, seed):
        update = keras.ops.convert_to_tensor(1, "int32")
        return np.array(random.normal((20000,), update, variable, "float32", seed))

    draws = [draw(*x) for x in ((0, 0), (0, 1), (1, 0), (1, 1))]
    correlations = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlations).max() < 0.03
    np.testing.assert_array_equal(draw(0, 0), draws[0])


def test_noise_is_normal():
    update = keras.ops.convert_to_tensor(7, "int32")
    draws = np.array(random.normal((200000,), update, 0, "float32", 0), "float64")
    assert np.mean(draws**3) == pytest.approx(0, abs=0.03)
    assert np.mean(draws**4) == pytest.approx(3, abs=0.1)
    assert np.mean(np.abs(draws) < 1) == pytest.approx(0.6827, abs=0.005)
    assert np.abs(draws).max() < 6


@pytest.mark.parametrize("shape", [(), (4,), (5, 3), (3, 1, 4), (2, 3, 4, 5)], ids=str)
def test_centralization_is_by_output(shape):
    """Yong et al. 2020, equation 1, written out for each output."""
    g = np.random.default_rng(4).normal(size=shape) + 2
    expected = g.copy()
    if len(shape) > 1:
        for i in range(shape[-1]):
            expected[..., i] -= sum(g[..., i].ravel()) / g[..., i].size
    (taken,) = steps([g], GradientCentralization())
    np.testing.assert_allclose(taken, expected, atol=1e-6)


def attention(x):
    layer = keras.layers.MultiHeadAttention(2, 4, name="mha")
    layer.build(x, x)
    return layer


# Kernel -> the axes along which an output unit's weights lie.
LAYERS = [
    (keras.layers.Dense(3), (4,), 0, (0,)),
    (keras.layers.Conv1D(3, 2), (5, 4), 0, (0, 1)),
    (keras.layers.Conv2D(3, 2), (5, 5, 4), 0, (0, 1, 2)),
    (keras.layers.Conv3D(3, 2), (5, 5, 5, 4), 0, (0, 1, 2, 3)),
    (keras.layers.Conv1DTranspose(3, 2), (5, 4), 0, (0, 2)),
    (keras.layers.Conv2DTranspose(3, 2), (5, 5, 4), 0, (0, 1, 3)),
    (keras.layers.DepthwiseConv1D(2, depth_multiplier=2), (5, 4), 0, (0,)),
    (keras.layers.DepthwiseConv2D(2), (5, 5, 4), 0, (0, 1)),
    (keras.layers.DepthwiseConv2D(2, name="block1a_dwconv2"), (5, 5, 4), 0, (0, 1)),
    (keras.layers.DepthwiseConv2D(2, name="conv_dw_1"), (5, 5, 4), 0, (0, 1)),
    (keras.layers.SeparableConv1D(3, 2), (5, 4), 0, (0,)),
    (keras.layers.SeparableConv2D(3, 2), (5, 5, 4), 1, (0, 1, 2)),
    (keras.layers.LSTM(3), (5, 4), 0, (0,)),
    (attention, (5, 8), 0, (0,)),
    (attention, (5, 8), 6, (0, 1)),
]


def kernel_of(layer, shape, index):
    if layer is attention:
        layer = attention((None, *shape))
    else:
        layer.build((None, *shape))
    return layer.trainable_variables[index]


@pytest.mark.representatives("attention-*", "layer[0-4]-*")
@pytest.mark.parametrize("layer, shape, index, axes", LAYERS)
def test_units_are_those_of_the_layer(layer, shape, index, axes):
    """Of which each has a mean and a norm of its own."""
    kernel = kernel_of(layer, shape, index)
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=kernel.shape), 3 * rng.normal(size=kernel.shape) + 1
    norms = [np.sqrt((x**2).sum(axes, keepdims=True)) for x in (w, g)]
    expected = {
        AdaptiveClipping: g * np.minimum(1, 0.1 * norms[0] / norms[1]),
        GradientCentralization: g - g.mean(axes, keepdims=True),
    }
    for make, taken in expected.items():
        kernel.assign(w)
        transforms = [make(0.1) if make is AdaptiveClipping else make()]
        optimizer = SGD(1.0, transforms=transforms)
        optimizer.apply([tf.constant(g, "float32")], [kernel])
        np.testing.assert_allclose(w - kernel.numpy(), taken, atol=2e-6)


def test_centralization_leaves_embeddings_out():
    table = kernel_of(keras.layers.Embedding(5, 3), (2,), 0)
    before = table.numpy()
    g = np.arange(15, dtype="float32").reshape(5, 3)
    SGD(1.0, transforms=[GradientCentralization()]).apply([tf.constant(g)], [table])
    np.testing.assert_allclose(before - table.numpy(), g, atol=1e-5)


def test_cautious_mask_follows_its_code():
    """u * mask / max(mean(mask), 1e-3), with u the step against the weight."""
    rng = np.random.default_rng(2)
    gradients = rng.normal(size=(20, 50))
    optimizer = SGD(1.0, momentum=0.9, transforms=[Cautious()])
    taken = steps(gradients, optimizer=optimizer)
    velocity = np.zeros(50)
    for g, step in zip(gradients, taken, strict=True):
        velocity = 0.9 * velocity + g
        mask = velocity * g > 0
        expected = velocity * mask / max(np.mean(mask), 1e-3)
        np.testing.assert_allclose(step, expected, atol=2e-5)


def test_a_spike_changes_nothing():
    w = keras.Variable([0.0])
    skip = SkipSpikes(factor=3.0, warmup_steps=2)
    optimizer = Adam(0.1, use_ema=True, transforms=[skip])
    for g in (1.0, 1.0, 1.0):
        optimizer.apply([tf.constant([g])], [w])
    slots = [v for v in optimizer.variables if "spikes" not in v.path]
    before = [*arrays(slots), w.numpy()]
    optimizer.apply([tf.constant([100.0])], [w])
    assert skip.skipped == 1
    for was, now in zip(before, [*arrays(slots), w.numpy()], strict=True):
        np.testing.assert_array_equal(was, now)
    optimizer.apply([tf.constant([1.0])], [w])
    assert int(optimizer.iterations) == 4
    assert optimizer.skipped_steps == 0  # those that weren't finite


def test_a_spike_drops_the_micro_steps_of_its_update():
    w = keras.Variable([0.0])
    skip = SkipSpikes(factor=3.0, warmup_steps=1)
    optimizer = SGD(1.0, gradient_accumulation_steps=2, transforms=[skip])
    for g in (1.0, 1.0, 1.0, 99.0, 1.0, 3.0):
        optimizer.apply([tf.constant([g])], [w])
    assert w.numpy().tolist() == [-3.0]  # means of (1, 1) and (1, 3)
    assert skip.skipped == 1
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("skip_first", [True, False])
def test_a_skipped_step_leaves_the_state_of_other_transforms(skip_first):
    skip, clip = SkipSpikes(warmup_steps=3), ZClip()
    optimizer = SGD(1.0, transforms=[skip, clip] if skip_first else [clip, skip])
    steps(np.ones((5, 1)), optimizer=optimizer)
    own = [v for v in optimizer.variables if "zclip" in v.path.lower()]
    before = arrays(own)
    w = optimizer._trainable_variables[0]
    optimizer.apply([tf.constant([1e4])], [w])
    assert skip.skipped == 1 and len(own) >= 2
    for was, now in zip(before, arrays(own), strict=True):
        np.testing.assert_array_equal(was, now)


def test_a_lasting_rise_is_followed():
    skip = SkipSpikes(factor=2.0, decay=0.5, warmup_steps=1)
    steps(np.array([1.0] * 3 + [50.0] * 20)[:, None], skip)
    assert 0 < skip.skipped < 15


# ------------------------------------------------------------------------ in order


def test_transforms_run_in_their_order_after_clipping():
    class Add(Transform):
        before = staticmethod(lambda g: g + 1.0)

    class Double(Transform):
        before = staticmethod(lambda g: g * 2.0)

    taken = steps(
        [[8.0]], optimizer=SGD(1.0, clipvalue=3.0, transforms=[Add(), Double()])
    )
    assert taken[0] == (3 + 1) * 2
    taken = steps(
        [[8.0]], optimizer=SGD(1.0, clipvalue=3.0, transforms=[Double(), Add()])
    )
    assert taken[0] == 3 * 2 + 1


@pytest.mark.parametrize(
    "transforms", [[Cautious], ["cautious"], Cautious(), None, [1]]
)
def test_wrong_transforms_are_refused(transforms):
    with pytest.raises(ValueError, match="`transforms` must be a list"):
        SGD(transforms=transforms)


def test_a_transform_belongs_to_one_optimizer():
    zclip = ZClip()
    compiled_model(SGD(transforms=[zclip])).train_on_batch(X, Y)
    with pytest.raises(ValueError, match="for this optimizer only"):
        SGD(transforms=[zclip])


def test_lazy_rows_take_no_transform():
    with pytest.raises(ValueError, match="`lazy=True` can't be combined"):
        SGD(lazy=True, transforms=[Cautious()])


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveClipping(0.0),
        lambda: AdaptiveClipping(exclude=["("]),
        lambda: ZClip(z_threshold=-1),
        lambda: ZClip(decay=1.0),
        lambda: ZClip(warmup_steps=1),
        lambda: GradientNoise(variance=-0.1),
        lambda: GradientNoise(seed=-1),
        lambda: GradientNoise(seed=0.5),
        lambda: GradientCentralization(exclude="bias"),
        lambda: SkipSpikes(factor=0),
    ],
)
def test_wrong_arguments_are_refused(make):
    with pytest.raises(ValueError, match="Received"):
        make()


# ------------------------------------------------------- with optimizers and models


@functools.cache
def trained(case: str, *stages: str) -> tuple[np.ndarray, bool]:
    """The weight at the end, and whether a step went along its gradient."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(8, 6, 4)).astype("float32")
    gradients[5] *= 100.0  # a spike
    w = keras.Variable(rng.normal(size=(6, 4)), dtype="float32", name="first")
    options = {k: x for name in stages for k, x in STAGES[name]().items()}
    optimizer = BY_NAME[case].make(**options)
    along = False
    for g in gradients:
        before = w.numpy()
        optimizer.apply([tf.constant(g)], [w])
        along |= bool(np.any((w.numpy() - before) * g > 0))
    return w.numpy(), along


@pytest.mark.representatives(
    "adam-*",
    "muon-adaptive_clipping",
    "lamb-zclip",
    "prodigy-skip_spikes",
    "schedule_free_adamw-cautious",
    "muon-mars",
    "schedule_free_adamw-lookahead",
)
@every_stage
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_works_with_every_optimizer(case, name):
    changed, _ = trained(case.name, name)
    plain, along = trained(case.name)
    assert np.isfinite(changed).all()
    # A rule without momentum never goes along its gradient: nothing to mask.
    without_effect = name == "cautious" and not along
    assert np.allclose(changed, plain, atol=1e-5) == without_effect


@pytest.mark.representatives("zclip", "mars", "lookahead")
@every_stage
def test_a_saved_model_goes_on_with_the_same_bits(name, tmp_path):
    model = compiled_model(Adam(0.05, **STAGES[name]()))
    train(model, 6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    (ours,), (theirs,) = loaded.optimizer.stages(), model.optimizer.stages()
    assert ours.get_config() == theirs.get_config()
    for m in (model, loaded):
        train(m, 4)
    pairs = zip(
        arrays(model.weights + model.optimizer.variables),
        arrays(loaded.weights + loaded.optimizer.variables),
        strict=True,
    )
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.representatives("zclip", "adaptive_clipping")
@every_stage
def test_eager_compiled_and_fit_are_equal(name):
    def trained(way):
        model = compiled_model(Adam(0.01, **STAGES[name]()))
        if way == "jit":
            model.compile(model.optimizer, "mse", jit_compile=True)
        if way == "eager":
            for _ in range(8):
                with tf.GradientTape() as tape:
                    loss = keras.losses.MeanSquaredError()(Y, model(X))
                weights = model.trainable_weights
                model.optimizer.apply(tape.gradient(loss, weights), weights)
        else:
            train(model, 8)
        return arrays(model.weights + model.optimizer.variables)

    eager = trained("eager")
    for way in ("fit", "jit"):
        for a, b in zip(eager, trained(way), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_number_of_a_transform_may_change_while_training():
    clip = AdaptiveClipping(1e-6, exclude=[])
    model = compiled_model(SGD(0.1, transforms=[clip]))
    train(model, 2)
    before = arrays(model.weights)
    clip.clipping = 10.0
    train(model, 1)
    assert traces(model.optimizer) == [1]
    moved = max(
        np.abs(a - b).max() for a, b in zip(before, arrays(model.weights), strict=True)
    )
    assert moved > 1e-3
    with pytest.raises(ValueError, match="after the optimizer was built"):
        clip.exclude = ["first"]


def test_state_of_other_devices_counts(tmp_path):
    """A norm over the whole model, of which a part is on another device."""
    gradients = [tf.constant([3.0]), tf.constant([4.0])]
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    together = SGD(1.0, transforms=[ZClip(0.5, 0.5, warmup_steps=2)])
    apart = SGD(1.0, transforms=[ZClip(0.5, 0.5, warmup_steps=2)])
    together.build(variables)
    engine = apart._engine
    apart.build(variables)
    for scale in (1.0, 1.2, 9.0):
        scaled = [scale * g for g in gradients]
        start = arrays(variables)
        together.apply(scaled, variables)
        expected = arrays(variables)
        for v, value in zip(variables, start, strict=True):
            v.assign(value)
        # Two programs, as for two devices.
        ((key, (program,)),) = together._engine.programs.by_set.items()
        engine.programs.by_set[key] = [
            Program(
                dataclasses.replace(
                    program.update,
                    variables=[engine.variables[i]],
                    kinds=[program.update.kinds[i]],
                ),
                tf.nest.map_structure(lambda v: v.value, [engine.state[i]]),
                [i],
            )
            for i in (0, 1)
        ]
        apart.apply(scaled, variables)
        for a, b in zip(expected, arrays(variables), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_small_model_has_the_paths_that_these_tests_name():
    assert any("second" in w.path for w in small_model().weights)
