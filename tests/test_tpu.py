"""Programs for TPU, compiled ahead of time. None of them was run on a TPU.

In an environment with the extra [tpu-compile]: pytest -m tpu_compile
"""

from __future__ import annotations

import importlib.metadata
import json

import keras
import numpy as np
import pytest
from cases import CASES

import tf_effopt

pytest.importorskip("tensorflow")

import tensorflow as tf

from tf_effopt import tpu
from tf_effopt.tpu import compiler, hlo, report
from tf_effopt.tpu.__main__ import main

OPTIMIZERS = list(dict.fromkeys(case.make.func for case in CASES))
needs_libtpu = pytest.mark.tpu_compile
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


def network(width: int = 1024, optimizer=None, dtype: str = "float32") -> keras.Model:
    """With a table, a matrix, a convolution and vectors.

    By default too large for a chip's vector memory, which a smaller one is copied to.
    """
    inputs = keras.Input((16,), dtype="int32")
    layers = keras.layers
    x = layers.Embedding(16 * width, width, dtype=dtype, name="table")(inputs)
    x = layers.Conv1D(width, 3, dtype=dtype, name="conv")(x)
    x = layers.BatchNormalization(synchronized=True, dtype=dtype, name="norm")(x)
    x = layers.Dense(width, "gelu", dtype=dtype, name="hidden")(x)
    x = layers.GlobalAveragePooling1D(dtype=dtype)(x)
    model = keras.Model(inputs, layers.Dense(10, name="head")(x), name="network")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or tf_effopt.AdamW(), loss, metrics=["accuracy"])
    return model


def with_optimizer(cls: type, **options):
    def make():
        if cls is tf_effopt.Muon:
            options["roles"] = tf_effopt.roles(network())
        # The compiler takes minutes for the eigenvectors of large matrices.
        return network(64 if cls is tf_effopt.SOAP else 1024, cls(**options))

    return make


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda c: c.__name__)
def test_update_is_in_place_and_has_one_all_reduce(cls, topology):
    found = tpu.compile_update(with_optimizer(cls), topology)
    assert found.error is None
    assert (found.optimizer, found.replicas) == (cls.__name__, 4)
    # All of it, but for the first weights that Prodigy keeps as they are.
    unchanged = found.state_bytes / 5 if cls is tf_effopt.Prodigy else 0
    assert found.alias_bytes >= found.state_bytes - unchanged
    if cls.elementwise:
        assert found.temporary_bytes < 0.1 * found.state_bytes
    if not found.is_read:
        assert cls is tf_effopt.SOAP
        return
    assert found.all_reduces == [["f32"]]
    assert not found.other_collectives
    assert not found.has_float64
    assert found.cycles > 0
    assert found.hbm_bytes > found.state_bytes


@needs_libtpu
def test_a_network_that_fits_into_vector_memory_needs_little_besides():
    """SGD has no state but the weights; a copy to vector memory isn't free either."""

    def make():
        model = keras.applications.ResNet50(weights=None)
        model.compile(tf_effopt.SGD(), "sparse_categorical_crossentropy")
        return model

    found = tpu.compile_update(make, "v6e:2x2")
    assert found.alias_bytes >= found.state_bytes
    assert found.temporary_bytes < 0.1 * found.state_bytes


@needs_libtpu
def test_options_are_in_the_one_program():
    options = {
        "global_clipnorm": 1.0,
        "use_ema": True,
        "gradient_accumulation_steps": 4,
        "transforms": [tf_effopt.transforms.ZClip(), tf_effopt.transforms.Cautious()],
    }
    found = tpu.compile_update(with_optimizer(tf_effopt.AdamW, **options))
    assert found.error is None
    assert found.all_reduces == [["f32"]]
    assert found.alias_bytes >= found.state_bytes


@needs_libtpu
def test_each_dtype_has_an_all_reduce_of_its_own():
    def make():
        return network(optimizer=tf_effopt.Adam(), dtype="bfloat16")

    found = tpu.compile_update(make)
    assert sorted(found.all_reduces) == [["bf16"], ["f32"]]


@needs_libtpu
def test_gradients_are_sent_in_16_bits():
    def make():
        optimizer = tf_effopt.Adam()
        tf_effopt.distribute.compress_gradients(optimizer)
        return network(optimizer=optimizer)

    found = tpu.compile_update(make)
    assert found.all_reduces == [["bf16"]]


@needs_libtpu
def test_divided_matrix_work_adds_one_collective():
    def make():
        optimizer = tf_effopt.Muon(roles=tf_effopt.roles(network()))
        tf_effopt.distribute.divide_matrix_work(optimizer)
        return network(optimizer=optimizer)

    found = tpu.compile_update(make)
    assert found.error is None
    assert len(found.all_reduces) == 2


@needs_libtpu
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_a_step_of_training_compiles(precision):
    def make():
        keras.config.set_dtype_policy(precision)
        return network()

    try:
        found = tpu.compile_train_step(make, batch_size=64)
    finally:
        keras.config.set_dtype_policy("float32")
    assert found.error is None
    # Statistics of the synchronized normalization, forward and backward; gradients.
    assert 1 <= len(found.all_reduces) <= 5
    assert found.alias_bytes >= found.state_bytes
    assert "network, batch of 64" in found.compiled


def table(optimizer) -> keras.Model:
    """Its gradient comes as rows."""
    layers = [keras.layers.Embedding(64, 8), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *layers])
    model.compile(optimizer, "mse")
    return model


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
def test_rows_of_a_gradient_are_summed_dense_as_on_a_tpu(topology):
    found = tpu.compile_train_step(lambda: table("adam"), 8, topology)
    assert found.error is None
    assert found.all_reduces == [["f32"]] * (found.replicas > 1)


@needs_libtpu
def test_lazy_rows_are_gathered_from_all_devices():
    found = tpu.compile_train_step(lambda: table(tf_effopt.Adam(lazy=True)), 8)
    assert found.error is None
    assert sorted(found.all_reduces) == [["f32"], ["s32"]]  # rows, and their numbers


@needs_libtpu
def test_on_one_device_there_is_no_collective():
    found = tpu.compile_update(with_optimizer(tf_effopt.Adam), "v5e:1x1")
    assert found.replicas == 1
    assert found.all_reduces == []


@needs_libtpu
def test_what_does_not_fit_is_said_in_a_users_words():
    def make():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(tf_effopt.Adam(), "mse")
        return model

    found = tpu.compile_train_step(
        make, 1, "v5e:1x1", (tf.TensorSpec((2**30, 4)), tf.TensorSpec((2**30, 2)))
    )
    assert "out of memory: it needs" in found.error
    assert "of the 15.75 GiB of a device" in found.error


@needs_libtpu
def test_command_line(capsys, tmp_path):
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    model = f"{__name__}:network"
    assert main(["--model", model, "--optimizer", "SGD", "AdamW", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["SGD", "AdamW"]
    assert "v5e:2x2 (4 replicas): compiles; " in lines[0]
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["versions"]["libtpu"] == compiler.PINNED["libtpu"]
    assert len(found["reports"]) == 2
    assert (
        "| `AdamW` | update of network | v5e:2x2 | 4 |"
        in (tmp_path / "a.md").read_text()
    )
    assert main(["--model", model, "--batch-size", "64"]) == 0
    assert "training step of network, batch of 64" in capsys.readouterr().out


@needs_libtpu
def test_wrong_arguments():
    with pytest.raises(ValueError, match="no such topology.*Received: topology='v5x"):
        tpu.compile_update(network, "v5x:2x2")
    with pytest.raises(ValueError, match="multiple of the 4 devices.*Received.*=6"):
        tpu.compile_train_step(network, 6)
    with pytest.raises(ValueError, match="built and compiled"):
        tpu.compile_update(lambda: keras.Sequential([keras.layers.Dense(1)]))


def sequential(loss):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model.compile("adam", loss)
    return model


def two_outputs(loss):
    inputs = {"a": keras.Input((8,)), "b": keras.Input((5,), dtype="int32")}
    outputs = [
        keras.layers.Dense(3, name="kind")(inputs["a"]),
        keras.layers.Dense(1, name="size")(inputs["a"]),
    ]
    model = keras.Model(inputs, outputs)
    model.compile("adam", loss)
    return model


SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (sequential("mse"), [((4, 3), "float32")]),
        (sequential(SPARSE), [((4,), "int32")]),
        (sequential("sparse_categorical_crossentropy"), [((4,), "int32")]),
        (
            sequential(keras.losses.sparse_categorical_crossentropy),
            [((4,), "int32")],
        ),
        (two_outputs("mse"), [((4, 3), "float32"), ((4, 1), "float32")]),
        (two_outputs([SPARSE, "mse"]), [((4,), "int32"), ((4, 1), "float32")]),
        (
            two_outputs({"size": "mae", "kind": SPARSE}),
            [((4,), "int32"), ((4, 1), "float32")],
        ),
    ],
)
def test_targets_are_guessed_by_the_loss_of_each_output(model, y):
    from tf_effopt.tpu import steps

    inputs, targets = steps._data_of(model, 4)
    assert [(tuple(t.shape), t.dtype.name) for t in tf.nest.flatten(targets)] == y
    shapes = [tuple(t.shape) for t in tf.nest.flatten(inputs)]
    assert shapes == [(4, 8), (4, 5)][: len(shapes)]


def raises():
    raise RuntimeError("my own trouble")


@needs_libtpu
def test_float64_is_refused_in_a_users_words():
    def make():
        layers = [keras.Input((4,)), keras.layers.Dense(2, dtype="float64")]
        model = keras.Sequential(layers)
        model.compile(tf_effopt.Adam(), "mse")
        return model

    for found in (tpu.compile_update(make), tpu.compile_train_step(make, 8)):
        assert "can't sum float64 over its devices" in found.error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "nowhere/a.json"], "there is no folder for nowhere/a.json"),
        (["--markdown", "nowhere/a.md"], "there is no folder for nowhere/a.md"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_an_unknown_optimizer_has_a_hint(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "check_installed", lambda: None)
    monkeypatch.setattr(compiler, "topology_devices", lambda topology: [None] * 4)
    made = ["--model", "test_tpu:network", "--optimizer", "adamw"]
    assert main(made) == 2
    assert "no optimizer 'adamw'. Did you mean AdamW?" in capsys.readouterr().err


def test_trouble_in_the_users_function_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "check_installed", lambda: None)
    monkeypatch.setattr(compiler, "topology_devices", lambda topology: [None] * 4)
    assert main(["--model", "test_tpu:raises"]) == 2
    error = capsys.readouterr().err
    assert "my own trouble" in error and "in raises" in error
    assert error.endswith("error: --model test_tpu:raises failed, see above\n")


def test_without_libtpu_the_error_names_the_extra(monkeypatch, capsys):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"tpu-compile.*Found: jax none"):
        compiler.check_installed()
    assert main(["--optimizer", "Adam"]) == 2
    assert "tf_effopt[tpu-compile]" in capsys.readouterr().err


# ------------------------------------------------------- reading a program's text

ARRAY = 8 * 128 * 4
PROGRAM = """\
HloModule m

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %n = f32[8,128]{1,0} negate(%p)
}

%yes (a: (f32[8,128])) -> (f32[8,128]) {
  %a = (f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%a), index=0
  %y = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  ROOT %t = (f32[8,128]{1,0}) tuple(%y)
}

%no (b: (f32[8,128])) -> (f32[8,128]) {
  ROOT %b = (f32[8,128]{1,0}) parameter(0)
}

ENTRY %main (q: f32[8,128], c: pred[]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  %c = pred[] parameter(1)
  %v = f32[8,128]{1,0:T(8,128)S(1)} fusion(%q), calls=%fused, backend_config={"estimated_cycles":"5"}
  %s = f32[8,128]{1,0} all-reduce(%v), to_apply=%add
  %g = (f32[8,128]{1,0}) tuple(%s)
  %i = (f32[8,128]{1,0}) conditional(%c, %g, %g), true_computation=%yes, false_computation=%no
  ROOT %r = f32[8,128]{1,0} get-tuple-element(%i), index=0
}
"""


def test_costs_are_read_off_the_program():
    costs = hlo.costs(PROGRAM)
    # Read q; write s; and in the costlier branch read x and write y.
    assert (costs.hbm_bytes, costs.cycles) == (4 * ARRAY, 75)
    assert costs.collectives == {"all-reduce": [["f32"]]}
    assert costs.summed_bytes == ARRAY
    assert not costs.has_float64
    assert costs.unknown_loops == 0


@pytest.mark.parametrize(
    ("dtype", "dimensions", "layout", "size", "in_hbm"),
    [
        ("f32", "8,128", "1,0:T(8,128)", 4096, True),
        ("f32", "5,3", "1,0:T(8,128)", 4096, True),  # padded to a tile
        ("f32", "128,3", "0,1:T(8,128)", 4096, True),  # the long axis is minor
        ("bf16", "10", "0", 20, True),
        ("pred", "", "", 1, True),
        ("f32", "8,128", "1,0:T(8,128)S(1)", 4096, False),  # in vector memory
    ],
)
def test_bytes_of_an_array(dtype, dimensions, layout, size, in_hbm):
    found = hlo.array(dtype, dimensions, layout)
    assert (found.size, found.in_hbm) == (size, in_hbm)


def test_a_report_is_a_line_and_a_row():
    good = tpu.Report(
        "Adam", "update", "v5e:2x2", 4, 6_000_000, None, 8_000_000, 6_000_000, 0
    )
    bad = tpu.Report("SOAP", "update", "v5e:2x2", 4, error="out of memory")
    assert "compiles; 8.0 MB of arguments, 6.0 MB of them updated" in str(good)
    assert str(bad).endswith("doesn't compile: out of memory")
    table = report.markdown([good, bad])
    assert "| `Adam` | update | v5e:2x2 | 4 | 8.0 | 6.0 | 0.0 |" in table
    assert "| `SOAP` | update | v5e:2x2 | 4 | out of memory |" in table


def test_bytes_of_state_are_those_of_the_arrays():
    model = network(8, tf_effopt.Adam())
    model.optimizer.build(model.trainable_variables)
    weights = sum(np.prod(v.shape) * 4 for v in model.trainable_variables)
    strategy = tf.distribute.get_strategy()
    blank = tpu.steps._blank(
        "", model.optimizer, model.trainable_variables, "", strategy
    )
    assert blank.state_bytes == 3 * weights
