"""Muon: which weights are matrices, and what is done to them."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from cases import arrays, compiled_model, small_model, train

import tf_effopt
from tf_effopt.base.role import OTHER, einsum
from tf_effopt.base.roles_by_path import role_by_path
from tf_effopt.engine.matrices import View
from tf_effopt.optimizers import muon
from tf_effopt.rules import Matrices
from tf_effopt.runtime import programs

pytestmark = pytest.mark.fresh_programs


@keras.saving.register_keras_serializable("tests")
class Mixer(keras.layers.Layer):
    """A layer whose weights Keras's names don't tell."""

    def build(self, shape):
        self.mixing = self.add_weight(shape=(2, shape[-1], shape[-1]), name="mixing")

    def call(self, x):
        return x @ self.mixing[0] @ self.mixing[1]


def transformer(head: bool = True, tied: bool = False) -> keras.Model:
    """Every kind of weight that a small network over tokens has."""
    tokens = keras.Input((6,), dtype="int32")
    if tied:
        embedding = keras.layers.ReversibleEmbedding(10, 8, name="words")
    else:
        embedding = keras.layers.Embedding(10, 8, name="words")
    x = embedding(tokens)
    x = keras.layers.Conv1D(8, 3, padding="same", name="mix")(x)
    x = x + keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    y = keras.layers.Dense(16, "relu", name="up")(x)
    x = x + keras.layers.Dense(8, name="down")(y)
    x = keras.layers.Dropout(0.1)(keras.layers.LayerNormalization(name="last")(x))
    if tied:
        x = embedding(x, reverse=True)
    elif head:
        x = keras.layers.Softmax()(keras.layers.Dense(10, name="vocabulary")(x))
    return keras.Model(tokens, x, name="transformer")


HIDDEN = [
    "mix/kernel",
    "attention/query/kernel",
    "attention/key/kernel",
    "attention/value/kernel",
    "attention/attention_output/kernel",
    "up/kernel",
    "down/kernel",
]


def gradients_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Random ones, the same at each call, by path."""
    rng = np.random.default_rng(0)
    return {
        v.path.removeprefix(f"{model.name}/"): rng.normal(size=v.shape).astype(
            "float32"
        )
        for v in model.trainable_variables
    }


def step_on(model: keras.Model, optimizer: tf_effopt.Optimizer) -> dict:
    """What one update adds to each weight, by path."""
    variables = model.trainable_variables
    before = arrays(variables)
    gradients = gradients_of(model).values()
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], variables)
    return {
        v.path.removeprefix(f"{model.name}/"): new - old
        for v, old, new in zip(variables, before, arrays(variables), strict=True)
    }


def plain_muon(**kwargs) -> tf_effopt.Muon:
    """Whose step is the orthogonalized gradient itself."""
    settings = {"weight_decay": None, "rms_rate": None, "momentum": 0.0}
    return tf_effopt.Muon(1.0, **settings | {"adam_lr_ratio": 0.0} | kwargs)


def moved(steps: dict) -> list[str]:
    return [path for path, step in steps.items() if np.any(step)]


def assert_orthogonal(matrix):
    # Newton-Schulz leaves singular values between 0.68 and 1.14.
    values = np.linalg.svd(matrix, compute_uv=False)
    assert np.all((values > 0.5) & (values < 1.25)), values


def test_muon_has_the_hidden_matrices_of_a_transformer_and_adamw_the_rest():
    model = transformer()
    roles = tf_effopt.roles(model)
    assert roles.paths("hidden") == HIDDEN
    assert roles.paths("head") == ["vocabulary/kernel"]
    assert roles.paths("embedding") == ["words/embeddings"]
    steps = step_on(
        model,
        plain_muon(
            roles=roles,
            adam_lr_ratio=0.01,
            adam_beta_1=0.8,
            adam_beta_2=0.9,
            epsilon=0.1,
            adam_weight_decay=None,
        ),
    )
    gradients = gradients_of(model)
    for path, step in steps.items():
        if path not in HIDDEN:
            g = gradients[path]
            adam = -0.01 * np.sqrt(0.1) * g / (np.sqrt(0.1 * g**2) + 0.1)
            np.testing.assert_allclose(step, adam, rtol=1e-3, atol=1e-6, err_msg=path)
        elif path == "mix/kernel":
            assert_orthogonal(step.reshape(-1, 8))
        else:
            # Per projection: both of attention's heads are one matrix.
            assert_orthogonal(step.reshape(8, -1) if step.size == 64 else step)


def test_each_head_may_be_a_matrix_of_its_own():
    model = transformer()
    steps = step_on(model, plain_muon(roles=tf_effopt.roles(model), split_heads=True))
    query, out = (
        steps["attention/query/kernel"],
        steps["attention/attention_output/kernel"],
    )
    for head in range(2):
        assert_orthogonal(query[:, head])
        assert_orthogonal(out[head])


@pytest.mark.parametrize(
    ("equation", "name", "heads"),
    [
        ("abc,cde->abde", "query", 1),
        ("abcd,cde->abe", "attention_output", 0),
        ("abcd,cdef->abef", "attention_output", 0),  # of an output of two axes
        ("abcd,bcde->ae", "projection", None),
        ("abc,bce->ae", "projection", None),  # over the sequence: no heads
        ("abc,cd->abd", "projection", None),
    ],
)
def test_heads_are_those_of_attention(equation, name, heads):
    assert einsum(equation, name).heads == heads


def test_tied_weights_are_an_embedding():
    roles = tf_effopt.roles(transformer(tied=True), {"words": "embedding"})
    assert roles.paths("embedding") == ["words/embeddings"]
    assert roles.paths("hidden") == HIDDEN


def test_a_kernel_used_inside_and_as_head_is_a_head():
    shared = keras.layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, shared(keras.layers.Dense(4)(shared(inputs))))
    assert tf_effopt.roles(model).paths("head") == ["shared/kernel"]


def test_a_backbone_has_no_head_and_says_so():
    with pytest.warns(
        UserWarning, match="No output layer is seen behind dropout.* in 'transformer'"
    ):
        roles = tf_effopt.roles(transformer(head=False))
    assert roles.paths("hidden") == HIDDEN


def test_a_head_behind_nested_models_and_wrappers():
    inner = keras.Sequential(
        [keras.Input((5, 4)), keras.layers.Dense(4, name="a")], name="inner"
    )
    outer = keras.Sequential([keras.Input((5, 4)), keras.layers.Dense(4), inner])
    assert tf_effopt.roles(outer).paths("head") == ["inner/a/kernel"]
    per_step = keras.layers.TimeDistributed(keras.layers.Dense(2, name="b"))
    outer = keras.Sequential([keras.Input((5, 4)), keras.layers.Dense(4), per_step])
    (path,) = tf_effopt.roles(outer).paths("head")
    assert path.endswith("b/kernel")


def built(layer, shape) -> keras.Model:
    inputs = keras.Input(shape)
    x = keras.layers.Reshape((-1,))(layer(inputs))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def numbered(shape) -> np.ndarray:
    return np.arange(np.prod(shape), dtype="float32").reshape(shape)


def matrices(optimizer: tf_effopt.Muon, model: keras.Model) -> dict[str, np.ndarray]:
    """What the rule would see of numbered weights, by path; without AdamW's."""
    seen = {}
    for v in model.trainable_variables:
        view = optimizer.part(v.path, tuple(v.shape)).matrices
        if view is not None:
            seen[v.path] = np.array(
                View(tuple(v.shape), view).to_matrices(numbered(v.shape))
            )
    return seen


@pytest.mark.parametrize(
    ("layer", "shape", "split"),
    [
        (keras.layers.LSTM(3), (5, 4), lambda k: np.split(k, 4, -1)),
        (keras.layers.GRU(3), (5, 4), lambda k: np.split(k, 3, -1)),
        (keras.layers.SimpleRNN(3), (5, 4), lambda k: [k]),
        (
            keras.layers.Bidirectional(keras.layers.LSTM(3)),
            (5, 4),
            lambda k: np.split(k, 4, -1),
        ),
        (keras.layers.ConvLSTM1D(2, 3), (5, 8, 2), lambda k: np.split(k, 4, -1)),
        (keras.layers.Conv2D(6, 3), (5, 5, 2), lambda k: [k]),
        (keras.layers.Conv2D(6, 3, groups=2), (5, 5, 4), lambda k: np.split(k, 2, -1)),
        (
            keras.layers.Conv2DTranspose(6, 3),
            (5, 5, 2),
            lambda k: [np.moveaxis(k, 2, -1)],
        ),
        (keras.layers.EinsumDense("abc,cd->abd", (5, 3)), (5, 4), lambda k: [k]),
        # A matrix for each of 5 positions.
        (keras.layers.EinsumDense("abc,bcd->abd", (5, 3)), (5, 4), list),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_matrices_of_a_layer(layer, shape, split):
    model = built(layer, shape)
    roles = tf_effopt.roles(model)
    seen = matrices(tf_effopt.Muon(roles=roles), model)
    kernels = [v for v in layer.trainable_variables if "kernel" in v.path]
    assert list(seen) == [v.path for v in kernels] == roles.paths("hidden")
    for v in kernels:
        expected = [x.reshape(-1, x.shape[-1]) for x in split(numbered(v.shape))]
        np.testing.assert_array_equal(seen[v.path], expected)


def test_views_go_back():
    for matrices, shape in [
        (Matrices((0,), (2,), (3, 2, 2)), (3, 4)),
        (Matrices((0, 1, 3), (2,)), (2, 3, 4, 5)),
        (Matrices((2,), (0,)), (2, 3, 4)),
    ]:
        view, x = View(shape, matrices), numbered(shape)
        np.testing.assert_array_equal(view.from_matrices(view.to_matrices(x)), x)


def test_filters_of_single_channels_are_no_matrices():
    separable = built(keras.layers.SeparableConv2D(4, 3, name="s"), (5, 5, 2))
    assert tf_effopt.roles(separable).paths("hidden") == ["s/pointwise_kernel"]
    for layer in (
        keras.layers.DepthwiseConv2D(3),
        keras.layers.Conv2D(4, 3, groups=2),  # of 2 channels: the same
    ):
        assert tf_effopt.roles(built(layer, (5, 5, 2))).paths("hidden") == []


def test_a_layer_that_is_unfrozen_later_has_its_role():
    model = transformer()
    model.get_layer("up").trainable = False
    optimizer = tf_effopt.Muon(roles=tf_effopt.roles(model))
    optimizer.build(model.trainable_variables)
    model.get_layer("up").trainable = True
    other = optimizer.carry_over(model.trainable_variables)
    assert "muon" in next(x for x in other.describe().splitlines() if "up/k" in x)


def test_a_layer_of_your_own_is_named():
    model = built(Mixer(name="mixer"), (5, 4))
    assert tf_effopt.roles(model).paths("hidden") == []
    roles = tf_effopt.roles(model, {"mixing": "hidden", "head/": "other"})
    assert roles.paths("hidden") == ["mixer/mixing"]
    assert roles.paths("head") == []


# ------------------------------------------------------------- without roles


def test_by_path_all_but_the_head_is_known_and_a_warning_shows_it():
    model = transformer()
    with pytest.warns(UserWarning, match="An output layer can't be told") as caught:
        steps = step_on(model, plain_muon(adam_weight_decay=None))
    # A convolution of one dimension can't be told by its shape alone.
    taken = [*HIDDEN[1:], "vocabulary/kernel"]
    assert moved(steps) == taken
    (text,) = [str(x.message) for x in caught if "by its path" in str(x.message)]
    lines = text.splitlines()[1:]
    assert [x.split()[1] for x in lines if x.split()[0] == "muon"] == taken
    others = [x.split()[1] for x in lines if x.split()[0] == "adamw"]
    assert {"mix/kernel", "words/embeddings"} <= {*others}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (keras.layers.LSTM(3), (5, 4)),
        (keras.layers.GRU(3), (5, 4)),
        (keras.layers.ConvLSTM1D(2, 3), (5, 8, 2)),
        (keras.layers.Conv1D(4, 3), (5, 4)),
        (keras.layers.Conv2D(6, 3), (5, 5, 2)),
        (keras.layers.Conv2DTranspose(6, 3), (5, 5, 2)),
        (keras.layers.DepthwiseConv2D(3), (5, 5, 2)),
        (keras.layers.SeparableConv2D(4, 3), (5, 5, 2)),
        (keras.layers.Dense(3), (5, 4)),
        (keras.layers.LayerNormalization(), (5, 4)),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_by_path_as_by_roles(layer, shape):
    model = built(layer, shape)
    known = matrices(tf_effopt.Muon(roles=tf_effopt.roles(model)), model)
    by_path = matrices(tf_effopt.Muon(exclude_layers=["head"]), model)
    assert list(by_path) == list(known)
    for path, expected in known.items():
        np.testing.assert_array_equal(by_path[path], expected)


def test_embeddings_if_asked_for():
    model = transformer()
    roles = tf_effopt.roles(model)
    steps = step_on(
        model,
        plain_muon(roles=roles, exclude_embeddings=False, adam_weight_decay=None),
    )
    assert "words/embeddings" in moved(steps)


# ------------------------------------------------------------- the iteration


@pytest.fixture
def iterated(monkeypatch) -> list[tuple]:
    """The shapes that the iteration is traced for; a trial compilation's come first."""
    shapes = []
    original = muon.orthogonalized

    def spy(x, *args):
        shapes.append(tuple(x.shape))
        return original(x, *args)

    monkeypatch.setattr(muon, "orthogonalized", spy)
    return shapes


def test_matrices_of_a_shape_go_together(iterated):
    model = transformer()
    step_on(model, plain_muon(roles=tf_effopt.roles(model)))
    assert {(1, 24, 8), (4, 8, 8), (1, 8, 16), (1, 16, 8)} <= set(iterated)
    assert not any(shape == (1, 8, 8) for shape in iterated[-4:])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_transposed_convolution_is_known_by_its_layer(rank):
    make = getattr(keras.layers, f"Conv{rank}DTranspose")
    inputs = keras.Input((4,) * rank + (6,))
    outputs = make(2, 3, name="image")(make(5, 3, name="decoder")(inputs))
    model = keras.Model(inputs, outputs)
    roles = tf_effopt.roles(model)
    decoder, image = (model.get_layer(name).kernel for name in ("decoder", "image"))
    hidden = roles.role(decoder.path, tuple(decoder.shape))
    assert hidden.kind == "hidden"
    assert hidden.matrices.inputs == (*range(rank), rank + 1)
    assert hidden.matrices.outputs == (rank,)
    assert roles.role(image.path, tuple(image.shape)).kind == "head"


def test_a_models_name_makes_no_embedding():
    class Mix(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

        def call(self, x):
            return x @ self.kernel

    tower = keras.Sequential(
        [keras.Input((4,)), Mix(name="mix")], name="embedding_tower"
    )
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(tower(inputs)))
    (path,) = (w.path for w in tower.weights)
    assert tf_effopt.roles(model).role(path, (4, 4)).kind == "hidden"


def test_a_matrix_without_elements_stays():
    weights = [keras.Variable(np.zeros((0, 3))), keras.Variable(np.zeros((2, 2)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain_muon().apply([np.zeros((0, 3)), np.ones((2, 2))], weights)
    assert weights[0].shape == (0, 3)
    assert np.all(weights[1].numpy() != 0)


def test_large_matrices_go_alone_on_a_cpu(iterated):
    shapes = [(256, 256), (256, 256), (16, 256), (16, 256)]
    weights = [keras.Variable(np.zeros(shape), name="kernel") for shape in shapes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain_muon().apply([np.ones(shape, "float32") for shape in shapes], weights)
    assert iterated[-3:] == [(1, 256, 256), (1, 256, 256), (2, 16, 256)]


def test_a_stack_has_only_so_many_matrices(iterated, monkeypatch):
    """What they are between products stays in a TPU's vector memory."""
    rng = np.random.default_rng(0)
    starts, gradients = rng.normal(size=(2, 5, 8, 8)).astype("float32")

    def stepped() -> list[np.ndarray]:
        programs._shared.clear()  # The limit isn't a part of their structure.
        weights = [keras.Variable(w, name="kernel") for w in starts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain_muon().apply(list(gradients), weights)
        return [w.numpy() for w in weights]

    together = stepped()
    assert iterated[-1:] == [(5, 8, 8)]
    monkeypatch.setattr("tf_effopt.engine.matrices.MOST_STACKED", 2 * 8 * 8 + 1)
    np.testing.assert_allclose(stepped(), together, atol=1e-6)
    assert iterated[-3:] == [(2, 8, 8), (2, 8, 8), (1, 8, 8)]
    monkeypatch.setattr("tf_effopt.engine.matrices.MOST_STACKED", 1)
    np.testing.assert_allclose(stepped(), together, atol=1e-6)
    assert iterated[-5:] == [(1, 8, 8)] * 5


def singular_values(**settings) -> np.ndarray:
    """Of Muon's step of a matrix with 8 inputs and 24 outputs."""
    w = keras.Variable(np.zeros((8, 24), "float32"), name="kernel")
    g = np.random.default_rng(0).normal(size=(8, 24)).astype("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain_muon(**settings).apply([g], [w])
    return np.linalg.svd(w.numpy(), compute_uv=False)


def test_more_steps_of_polar_express_come_nearer_to_one():
    errors = [
        np.abs(singular_values(iteration="polar_express", ns_steps=n) - 1).max()
        for n in (3, 5, 7)
    ]
    assert errors[0] > errors[1] > errors[2]
    newton_schulz = np.abs(singular_values() - 1).max()
    assert errors[1] < newton_schulz / 1.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rms_rate": 0.2}, 0.2 * np.sqrt(24)),
        ({"rms_rate": 0.3}, 0.3 * np.sqrt(24)),
        ({"scale": "original"}, np.sqrt(3)),
        ({"rms_rate": None}, 1),
    ],
)
def test_scale(settings, expected):
    unscaled = singular_values(rms_rate=None)
    np.testing.assert_allclose(
        singular_values(**settings), expected * unscaled, rtol=1e-5
    )


def test_a_zero_gradient_leaves_the_weight():
    w = keras.Variable(np.ones((3, 4), "float32"), name="kernel")
    optimizer = tf_effopt.Muon(0.1, weight_decay=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.apply([np.zeros((3, 4), "float32")], [w])
    np.testing.assert_array_equal(w.numpy(), np.ones((3, 4)))


# ----------------------------------------------------------------- its state


def test_roles_are_saved_as_paths(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="first"),
            keras.layers.Dense(2, name="second"),
        ],
        name="small",
    )
    roles = tf_effopt.roles(model)
    train(compiled_model(tf_effopt.Muon(0.01, roles=roles), model), 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.roles == roles
    train(model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(loaded, 2)
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def attention_model() -> keras.Model:
    inputs = keras.Input((4, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = keras.layers.Dense(4, name="inner")(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def test_state_of_keras_is_converted():
    """Keras's takes attention's biases for matrices, and not its kernels."""
    model = attention_model()
    theirs = keras.optimizers.Muon(0.01)
    model.compile(theirs, loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 4, 8)), rng.normal(size=(4, 2))
    for _ in range(3):
        model.train_on_batch(x, y)
    store = {}
    theirs.save_own_variables(store)
    ours = tf_effopt.Muon(0.01, roles=tf_effopt.roles(model))
    ours.load_own_variables(store)
    ours.build(model.trainable_variables)
    assert int(ours.iterations) == 3
    slots = {v.path: v.numpy() for v in ours.variables[2:]}
    saved = {v.path: v.numpy() for v in theirs.variables[2:]}

    def slot(state, *names):
        (key,) = [k for k in state if all(name in k for name in names)]
        return state[key]

    query = "attention_query_kernel", "momentum"
    np.testing.assert_array_equal(slot(slots, *query), slot(saved, *query))
    bias = slot(saved, "attention_query_bias", "momentum")
    mean = np.float32(1 - 0.95) * bias
    found = slot(slots, "attention_query_bias", "momentum")
    np.testing.assert_allclose(found, mean, rtol=1e-6)
    found = slot(slots, "attention_query_bias", "velocity")
    np.testing.assert_allclose(found, mean**2, rtol=1e-6)
    head = slot(slots, "head_kernel", "momentum")
    np.testing.assert_allclose(
        head, np.float32(1 - 0.95) * slot(saved, "head_kernel", "momentum"), rtol=1e-6
    )
    before = arrays(model.trainable_variables)
    model.compile(ours, loss="mse")
    model.train_on_batch(x, y)
    assert not np.array_equal(before[0], model.trainable_variables[0])


def test_state_of_another_kind_isnt_taken_for_keras():
    model = attention_model()
    other = keras.optimizers.Adam(0.01)
    other.build(model.trainable_variables)
    store = {}
    other.save_own_variables(store)
    store["0"] = np.array(3)
    ours = tf_effopt.Muon(0.01, roles=tf_effopt.roles(model))
    ours.build(model.trainable_variables)
    with pytest.raises(ValueError, match="doesn't fit"):
        ours.load_own_variables(store)


# -------------------------------------------------------- custom layers


def test_layers_of_two_models_with_one_path_keep_their_roles(tmp_path):
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="dense")])
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8, name="dense"), inner]
    )
    optimizer = tf_effopt.Muon(0.01, roles=tf_effopt.roles(model))
    compiled_model(optimizer, model)
    optimizer.build(model.trainable_variables)
    rules = [variable.part for variable in optimizer._engine.variables]
    assert rules == ["muon", "adamw", "adamw", "adamw"]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    # Keras 3.15 loses the inner model's name, 3.16 doesn't.
    of_one_path = keras.__version__.startswith("3.15.")
    paths = {v.path for v in loaded.trainable_variables}
    assert len(paths) == (2 if of_one_path else 4)
    again = [variable.part for variable in loaded.optimizer._engine.variables]
    assert again == rules


class LSTMCell(keras.layers.Layer):
    """Named as Keras's, with other weights."""

    def build(self, shape):
        self.mixing = self.add_weight(shape=(shape[-1], 6), name="mixing")

    def call(self, x):
        return x @ self.mixing


class NoisyDense(keras.layers.Dense):
    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1], self.units), name="mean")
        self.built = True

    def call(self, x):
        return x @ self.mean


class WithSpare(keras.Model):
    def __init__(self):
        super().__init__()
        self.used, self.spare = keras.layers.Dense(4), keras.layers.Dense(4)

    def call(self, x):
        return self.used(x)


def test_what_a_layer_of_ones_own_lacks_has_no_role():
    model = keras.Sequential(
        [keras.Input((5,)), LSTMCell(), NoisyDense(6), keras.layers.Dense(2)]
    )
    kinds = {p: k for k in ("hidden", "head") for p in tf_effopt.roles(model).paths(k)}
    names = {path.split("/", 1)[1]: kind for path, kind in kinds.items()}
    assert list(names.values()) == ["hidden", "hidden", "head"]
    spared = WithSpare()
    spared(np.ones((1, 3)))
    with pytest.warns(UserWarning, match="No output layer is seen"):
        assert len(tf_effopt.roles(spared).paths("hidden")) == 1


def test_slopes_of_activations_are_no_matrices():
    layers = [keras.Input((5, 6)), keras.layers.PReLU(name="p"), keras.layers.Dense(2)]
    roles = tf_effopt.roles(keras.Sequential(layers))
    assert roles.paths("hidden") == []
    (slopes,) = [path for path in roles.paths("other") if path.endswith("alpha")]
    assert roles.role(slopes, (5, 6)).kind == "other"


def test_each_output_without_a_layer_is_named():
    x = inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="inner")(x)
    seen = keras.layers.Dense(3, name="seen")(x)
    total = keras.layers.Add(name="total")([x, keras.layers.Dense(4, name="deep")(x)])
    with pytest.warns(UserWarning, match="No output layer is seen behind total in"):
        roles = tf_effopt.roles(keras.Model(inputs, [seen, total]))
    assert roles.paths("head") == ["seen/kernel"]
    softmax = keras.Sequential([keras.Input((3,)), keras.layers.Softmax()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roles = tf_effopt.roles(keras.Model(inputs, softmax(seen)))
    assert roles.paths("head") == ["seen/kernel"]


def test_training_goes_on_with_the_roles_of_a_grown_model():
    model = small_model()
    optimizer = tf_effopt.Muon(0.01, roles=tf_effopt.roles(model))
    compiled_model(optimizer, model)
    train(model, 2)
    grown = keras.Sequential([model, keras.layers.Dense(3, name="grown")])
    with pytest.raises(ValueError, match=r"`carry_over\(variables, roles=...\)`"):
        optimizer.carry_over(grown.trainable_variables)
    roles = tf_effopt.roles(grown)
    later = optimizer.carry_over(grown.trainable_variables, roles=roles)
    assert later.iterations.numpy() == 2
    kept = [v for v in later.variables if "grown" not in v.path][2:]
    assert any(np.any(v.numpy()) for v in kept)
    assert later.roles == roles


# -------------------------------------------------------------------- errors


def test_errors_of_roles():
    with pytest.raises(ValueError, match="needs a Keras model whose weights exist"):
        tf_effopt.roles([small_model()])
    for override in (["first"], {"(": "head"}, {3: "head"}):
        with pytest.raises(ValueError, match="Received: "):
            tf_effopt.roles(small_model(), override)
    with pytest.raises(ValueError, match="isn't built"):
        tf_effopt.roles(keras.Sequential([keras.layers.Dense(2)]))
    model = small_model()
    with pytest.raises(ValueError, match="matches no weight; the nearest"):
        tf_effopt.roles(model, {"frist/kernel": "head"})
    with pytest.raises(ValueError, match="'embedding', 'head' or 'other'|must be one"):
        tf_effopt.roles(model, {"first": "inner"})
    with pytest.raises(ValueError, match="is no matrix"):
        tf_effopt.roles(model, {"first": "hidden"})


def test_errors_of_muon():
    model = small_model()
    with pytest.raises(ValueError, match="`roles` must be what .*Received: roles="):
        tf_effopt.Muon(roles={"kernel": "hidden"})
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="other")])
    optimizer = tf_effopt.Muon(roles=tf_effopt.roles(other))
    with pytest.raises(ValueError, match="has no variable .*first/kernel.* again"):
        optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="`iteration` must be one of"):
        tf_effopt.Muon(iteration="svd")
    with pytest.raises(ValueError, match="can't be combined with Muon"):
        tf_effopt.Muon(lazy=True)


def test_errors_of_divided_work():
    divide = tf_effopt.distribute.divide_matrix_work
    with pytest.raises(ValueError, match="takes an optimizer of tf_effopt. Received"):
        divide(keras.optimizers.Muon())
    with pytest.raises(
        ValueError, match="can't be combined with gradient accumulation"
    ):
        divide(tf_effopt.Muon(gradient_accumulation_steps=2))
    built = tf_effopt.Muon(exclude_layers=["kernel"])
    built.build(small_model().trainable_variables)
    with pytest.raises(ValueError, match="is built already"):
        divide(built)


def test_a_wrapped_one_is_carried_over_with_other_roles():
    model = small_model()
    wrapped = tf_effopt.LossScaleOptimizer(plain_muon())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.build(model.trainable_variables)
    roles = tf_effopt.roles(model)
    carried = wrapped.carry_over(model.trainable_variables, roles=roles)
    assert carried.inner_optimizer.roles is roles


@pytest.mark.parametrize("layer", ["keypoints", "monkey", "query_conv", "values_1"])
def test_a_layer_that_sounds_like_attention_isnt(layer):
    attention = role_by_path("attention/query/kernel", (3, 8, 16))
    assert (
        attention.matrices != role_by_path(f"model/{layer}/kernel", (3, 8, 16)).matrices
    )


@pytest.mark.parametrize("layer", ["block1a_dwconv", "conv_dw_1", "depthwise_2"])
def test_a_depthwise_kernel_is_no_hidden_matrix_by_its_path(layer):
    role = role_by_path(f"net/{layer}/kernel", (3, 3, 32, 1))
    assert role.kind == OTHER


def test_divided_work_on_one_device_is_the_same():
    inner = tf_effopt.Muon(0.01, roles=tf_effopt.roles(small_model()))
    divided = tf_effopt.LossScaleOptimizer(inner, initial_scale=8.0)
    tf_effopt.distribute.divide_matrix_work(divided)
    plain = tf_effopt.Muon(0.01, roles=tf_effopt.roles(small_model()))
    models = [train(compiled_model(optimizer), 2) for optimizer in (divided, plain)]
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
