"""Programs for TPU, compiled ahead of time. None of them was run on a TPU.

In an environment with the extra [tpu-compile]: pytest -m tpu_compile
"""

from __future__ import annotations

import importlib.metadata
import json
import re

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
@pytest.mark.representatives("Adam", "Muon")
@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda c: c.__name__)
def test_stages_with_slots_are_in_the_one_program(cls):
    options = {
        "transforms": [tf_effopt.transforms.MARS()],
        "averaging": tf_effopt.averaging.Lookahead(),
    }
    found = tpu.compile_update(with_optimizer(cls, **options))
    assert found.error is None
    plain = tpu.compile_update(with_optimizer(cls))
    trained = with_optimizer(cls)().trainable_variables
    weights = sum(4 * v.value.shape.num_elements() for v in trained)
    # One value per parameter each, written in place as all others.
    assert found.state_bytes == plain.state_bytes + 2 * weights
    assert found.alias_bytes >= plain.alias_bytes + 2 * weights
    if found.is_read:
        assert found.all_reduces == [["f32"]]


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


def small():
    return sequential("mse")


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


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """What is said to be compiled, without libtpu: the names of optimizers."""
    names = []

    def compile_update(make_model, topology):
        names.append(type(make_model().optimizer).__name__)
        return tpu.Report(names[-1], "update", topology, 4)

    monkeypatch.setattr(compiler, "check_installed", lambda: None)
    monkeypatch.setattr(compiler, "topology_devices", devices_without_libtpu)
    monkeypatch.setattr("tf_effopt.tpu.__main__.compile_update", compile_update)
    return names


def devices_without_libtpu(topology):
    fault = compiler._fault_of(topology)
    if fault:
        raise compiler._no_such(topology, fault)
    return [None] * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--optimizer", "Adam", "adamw"],
            "no optimizer 'adamw' .*mean AdamW\\? It has",
        ),
        (["--optimizer", "Adam", "Optimizer"], "no optimizer 'Optimizer'"),
        (["--optimizer", "LossScaleOptimizer"], "'LossScaleOptimizer' .*arguments. It"),
        (["--topology", "v5e:2x2", "v9:2x2"], "no such topology.*'v9:2x2'"),
    ],
)
def test_names_are_checked_before_the_first_compilation(
    arguments, said, compiled, capsys
):
    assert main(["--model", "test_tpu:small", *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not compiled


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_folder_is_no_file_to_write_to(option, tmp_path, compiled, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "test_tpu:small", option, str(tmp_path)])
    assert f"{tmp_path} is a folder" in capsys.readouterr().err
    assert not compiled


def test_every_optimizer_with_a_name_can_be_made(compiled, capsys):
    names = tf_effopt.optimizers.__all__
    assert main(["--model", "test_tpu:small", "--optimizer", *names]) == 0
    assert compiled == names
    assert {cls.__name__ for cls in OPTIMIZERS} == set(compiled)


def test_what_was_finished_is_written_where_the_rest_fails(
    tmp_path, compiled, monkeypatch, capsys
):
    made = []

    def second_fails():
        made.append(small())
        if len(made) == 2:
            raise RuntimeError("my own trouble")
        return made[-1]

    monkeypatch.setattr(report, "versions", dict)
    monkeypatch.setitem(globals(), "second_fails", second_fails)
    path = tmp_path / "a.json"
    arguments = ["--topology", "v5e:2x2", "v5e:4x4", "--json", str(path)]
    assert main(["--model", f"{__name__}:second_fails", *arguments]) == 2
    assert [r["topology"] for r in json.loads(path.read_text())["reports"]] == [
        "v5e:2x2"
    ]


def test_a_step_that_cannot_be_traced_is_no_failed_compilation(
    compiled, monkeypatch, capsys
):
    def fails(*arguments):
        raise TypeError("in the user's step")

    monkeypatch.setattr("tf_effopt.tpu.__main__.compile_train_step", fails)
    assert main(["--model", "test_tpu:small", "--batch-size", "8"]) == 2
    error = capsys.readouterr().err
    assert "in the user's step" in error
    assert error.endswith("error: no program was made, see above\n")


def test_trouble_in_the_users_function_is_shown(compiled, capsys):
    assert main(["--model", "test_tpu:raises"]) == 2
    error = capsys.readouterr().err
    assert "my own trouble" in error and "in raises" in error
    assert "in _with_optimizer" not in error
    assert error.endswith("error: --model test_tpu:raises failed, see above\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import keras\ndef make(:\n", "line 2\n.*def make\\(:"),
        ("\nraise RuntimeError('mine')", "line 2, in <module>\n.*\n?.*mine"),
        ("import no_such_thing", "line 1, in <module>\n.*\n?.*'no_such_thing'"),
        ("raise SystemExit(0)", "line 1, in <module>"),
    ],
)
def test_trouble_in_the_users_module_is_shown(
    text, said, tmp_path, monkeypatch, compiled, capsys
):
    name = f"users_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--model", f"{name}:make"]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{name}.py\", {said}", error)
    assert "importlib" not in error and "__main__.py" not in error
    assert error.endswith(f"error: --model {name}:make failed, see above\n")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./test_tpu:small", "--model test_tpu:small. Received"),
        ("test_tpu.py:small", "--model test_tpu:small. Received"),
        ("tests/test_tpu.py:small", "in its folder, --model test_tpu:small. Received"),
        ("no_such_thing:small", "No module named 'no_such_thing': it is looked for"),
        ("no_such.thing:small", "No module named 'no_such': it is looked for"),
        ("test_tpu:smal", "test_tpu has no function 'smal'. Did you mean small?"),
        ("test_tpu:TOPOLOGIES", "test_tpu has no function 'TOPOLOGIES'."),
        ("test_tpu", "--model takes MODULE:FUNCTION. Received: --model test_tpu"),
    ],
)
def test_a_model_that_is_not_there_is_said_in_a_line(model, said, compiled, capsys):
    assert main(["--model", model]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "fault"),
    [
        ("v5e:0x0", "at least 1"),
        ("v4:0x2x2", "at least 1"),
        ("v5e:64x64", "at most 256 chips, within 16x16x1"),
        ("v5e:1x256", "at most 256 chips"),
        ("v5e:4x4x16", "at most 256 chips"),
        ("v5p:28x28x28", "at most 8960 chips"),
        ("v9:2x2", "chips are v2, "),
        ("", "a chip and two or three sizes"),
        ("v5e:2", "a chip and two or three sizes"),
        ("v5e:2x2\n", "a chip and two or three sizes"),
    ],
)
def test_a_topology_that_would_end_the_process_is_refused(topology, fault):
    with pytest.raises(ValueError, match=f"no such topology.*{fault}"):
        compiler.topology_devices(topology)


@pytest.mark.parametrize(
    "topology",
    ["v2:2x2", "v4:2x2", "v5e:1x1", "v5e:16x16", "v5p:16x20x28", "v5p:12x24x24"],
)
def test_topologies_that_exist_are_passed_on(topology):
    assert compiler._fault_of(topology) is None


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
