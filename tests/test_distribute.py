"""Several replicas and several workers train as one device does; see workers.py."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import IO

import keras
import numpy as np
import pytest

import tf_effopt

tf = pytest.importorskip("tensorflow")

from workers import CASES

from tf_effopt.distribute import launch, tf_config
from tf_effopt.training.fit import _PackedLogs

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ROOT / "tests" / "workers.py"
TIME_LIMIT = 1800  # seconds for all cases of a group
NAMES = [case.__name__ for case in CASES]
FEW = [
    "accumulation",
    "an_empty_replica_of_losses_and_means",
    "losses_that_layers_add",
    "on_batch",
    "infinite",
]
# Of a model with several outputs Keras takes the mean over batches, not examples, of
# each one's loss, here over batches and replicas.
PER_REPLICA = ("logs/a_loss", "logs/b_loss")


def run(group: str, folder: Path, cases: list[str]) -> dict[str, np.ndarray]:
    """Runs a group of strategies in processes of its own; returns what they found."""
    output = folder / f"{group}.npz"
    several = group == "workers"
    launcher = (
        ["-m", "tf_effopt.distribute.launch", "--workers", "2"] if several else []
    )
    process = subprocess.run(
        [sys.executable, *launcher, str(WORKERS), group, str(output), *cases],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        timeout=TIME_LIMIT,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    paths = [Path(f"{output}.{i}") for i in range(2)] if several else [output]
    found = {}
    for number, path in enumerate(paths):
        with np.load(path) as file:
            for key in file.files:
                name = key.replace("workers|", f"worker{number}|")
                found[name] = file[key]
    return found


def trained(groups: list[str], folder: Path, cases: list[str]) -> dict[str, np.ndarray]:
    with futures.ThreadPoolExecutor() as pool:
        runs = pool.map(lambda group: run(group, folder, cases), groups)
        results = {key: x for found in runs for key, x in found.items()}
    # A collective that fails poisons its process: what failed is tried alone.
    for key in [key for key in results if key.endswith("|error")]:
        where, case, _ = key.split("|")
        group = "workers" if where.startswith("worker") else where
        del results[key]
        results |= run(group, folder, [case])
    return results


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("few")
    return trained(["none,mirrored2", "workers"], folder, FEW)


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("all")
    return trained(["none,mirrored2", "mirrored4", "workers"], folder, [])


def part(found: dict, where: str, case: str) -> dict[str, np.ndarray]:
    prefix = f"{where}|{case}|"
    values = {
        k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)
    }
    assert "error" not in values, str(values["error"])
    assert values
    return values


def check_equal(found: dict, case: str, where: str) -> None:
    one, several = part(found, "none", case), part(found, where, case)
    assert several.pop("replicas", 0) == 0, "replicas differ"
    one.pop("replicas", None)
    assert one.keys() == several.keys()
    for name, expected in one.items():
        if not name.startswith(PER_REPLICA):
            np.testing.assert_allclose(
                several[name], expected, rtol=1e-5, atol=1e-5, err_msg=name
            )


def check_infinite(found: dict, where: str) -> None:
    values = part(found, where, "infinite")
    assert values["skipped"] == 2  # once an epoch
    assert values["scale"] == 2.0
    assert all(np.all(np.isfinite(v)) for k, v in values.items() if k[:4] == "vari")


@pytest.mark.parametrize("where", ["mirrored2", "worker0", "worker1"])
@pytest.mark.parametrize("case", FEW)
def test_equals_one_device(few, case, where):
    check_equal(few, case, where)


@pytest.mark.parametrize("where", ["none", "mirrored2", "worker0", "worker1"])
def test_an_infinite_gradient_in_one_worker_skips_the_step_on_both(few, where):
    check_infinite(few, where)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["mirrored2", "mirrored4", "worker0", "worker1"])
@pytest.mark.parametrize("case", NAMES)
def test_each_case_equals_one_device(all_cases, case, where):
    check_equal(all_cases, case, where)
    if case == "infinite":
        check_infinite(all_cases, where)


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
def test_workers_end_with_the_same_bits(all_cases, case):
    first, second = part(all_cases, "worker0", case), part(all_cases, "worker1", case)
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_plain_numbers_in_logs_are_packed_with_tensors():
    logs = {"loss": tf.constant(2.5), "rate": 0.5, "counts": np.array([1, 2])}
    packed = _PackedLogs(lambda data: logs)
    found = packed.unpacked(packed.packed(None)[0])
    assert {k: v.numpy().tolist() for k, v in found.items()} == {
        "loss": 2.5,
        "rate": 0.5,
        "counts": [1.0, 2.0],
    }


# ----------------------------------------------------------- strategies by name


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "import tf_effopt\n" + code],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "tensorflow", **environment},
        timeout=120,
    )


def test_private_names_that_are_missing_are_named_before_anything_is_replaced():
    code = """
import keras
from keras.src.losses import loss
from keras.src.metrics import reduction_metrics
del reduction_metrics.reduce_to_samplewise_values
before = loss.apply_mask
strategy = tf_effopt.distribute.strategy("mirrored", replicas=2)
with strategy.scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(tf_effopt.SGD(0.1), "mse")
try:
    tf_effopt.distribute.prepare(model)
except RuntimeError as error:
    message = str(error)
assert loss.apply_mask is before
assert "reduction_metrics.reduce_to_samplewise_values" in message, message
assert f"Keras {keras.__version__} with TensorFlow 2." in message, message
"""
    finished = python(code)
    assert finished.returncode == 0, finished.stderr


def test_strategies_by_name():
    code = """
make = tf_effopt.distribute.strategy
mirrored = make("mirrored", replicas=3)
assert mirrored.num_replicas_in_sync == 3
assert make("mirrored", replicas=2).num_replicas_in_sync == 2
assert make("none").num_replicas_in_sync == 1
assert make("auto").num_replicas_in_sync == 1
assert make().num_replicas_in_sync == 1
"""
    process = python(code, CUDA_VISIBLE_DEVICES="-1")
    assert process.returncode == 0, process.stderr


REFUSED = {
    "'two'": "`name` must be one of 'auto', 'none'.*Received: name='two'",
    "'mirrored', replicas=0": "must be an integer of at least 1. Received: replicas=0",
    "'mirrored', replicas=True": "of at least 1. Received: replicas=True",
    "'none', replicas=2": "`replicas` is for 'mirrored'.*replicas=2",
    "'mirrored'": r"No GPU is visible.*replicas=2.*tf_effopt\[gpu\]",
    "'multi_worker'": "TF_CONFIG, such as .*launch --workers 2.*TF_CONFIG=''",
    "'tpu'": r"built without TPUs.*pip install \"tf_effopt\[tpu\]\"",
}


def what_is_said_of(
    calls: list[str], before: str = "", **environment: str
) -> list[str]:
    """The errors of `tf_effopt.distribute.strategy`, called in a separate process."""
    code = before + "\nimport json\nsaid = []\n"
    for call in calls:
        code += f"""
try:
    tf_effopt.distribute.strategy({call})
    said.append("")
except Exception as error:
    said.append(str(error).replace("\\n", " "))
"""
    code += "print(json.dumps(said))"
    process = python(code, CUDA_VISIBLE_DEVICES="-1", **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_what_is_missing_is_said_with_its_remedy():
    for expected, said in zip(
        REFUSED.values(), what_is_said_of(list(REFUSED), TF_CONFIG=""), strict=True
    ):
        assert re.search(expected, said), said


def test_a_strategy_that_comes_too_late_is_refused():
    (port,) = launch.free_ports(1)
    config = {
        "cluster": {"worker": [f"127.0.0.1:{port}"]},
        "task": {"type": "worker", "index": 0},
    }
    started = "import tensorflow as tf\ntf.zeros(1) + 1"
    calls = ["'mirrored', replicas=2", "'multi_worker'"]
    for said in what_is_said_of(calls, started, TF_CONFIG=json.dumps(config)):
        assert "TensorFlow has started already" in said


IN_A_PROCESS = """
import keras, tf_effopt
strategy = tf_effopt.distribute.strategy("mirrored", replicas=2)
metric = keras.metrics.MeanAbsoluteError(name="outside")
with strategy.scope():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=[metric])
tf_effopt.distribute.prepare(model)
x = keras.ops.ones((4, 3))
model.fit(x, x[:, :1], verbose=0)
"""


def test_a_metric_made_outside_of_the_scope_is_refused():
    command = [sys.executable, "-c", IN_A_PROCESS]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "The metric 'outside' was made outside of `with strategy" in done.stderr


CONFIG = {
    "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
    "task": {"type": "worker", "index": 0},
}


def test_a_model_of_one_worker_among_several_is_warned_of(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", json.dumps(CONFIG))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="TF_CONFIG names 2 workers, but"):
        tf_effopt.distribute.prepare(model)


def tf_config_of(kind: str = "worker", index: object = 0, **cluster: object) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


TWO = ["127.0.0.1:1", "127.0.0.1:2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it isn't JSON"),
        ("[]", "it must be a dictionary, not \\[\\]"),
        ('{"cluster": {}}', "it has no 'task'"),
        ('{"cluster": [], "task": {}}', "'cluster' must be a dictionary"),
        ('{"cluster": {}, "task": null}', "'task' must be a dictionary, not null"),
        (tf_config_of(worker="127.0.0.1:12345"), 'a list.*not "127.0.0.1:12345"'),
        (tf_config_of(worker=[TWO]), 'HOST:PORT.*is \\["127.0.0.1:1", '),
        (tf_config_of(worker=[TWO[0], None]), "HOST:PORT.*this one is null"),
        (tf_config_of(worker=["host0", "host1"]), 'HOST:PORT.*is "host0"'),
        (tf_config_of(worker=["host0:port"]), 'HOST:PORT.*is "host0:port"'),
        (tf_config_of(worker=["host0:65536"]), 'at most 65535.*"host0:65536"'),
        (tf_config_of(worker=["http://host0:1"]), 'without http://.*"http://host0:1'),
        (tf_config_of(worker=[TWO[0]] * 2), "two workers have .*'127.0.0.1:1'"),
        (tf_config_of(worker=[TWO[0], "127.0.0.1:0"]), "no port may be 0"),
        (tf_config_of(worker={"0": TWO[0], "2": TWO[1]}), "from 0 on.* not 0, 2"),
        (tf_config_of(workers=TWO), "has 'workers', which is none of 'chief', 'w"),
        (tf_config_of(chief=TWO), "there may be one 'chief', not 2"),
        (tf_config_of("ps", worker=TWO, ps=["a:1"]), "'chief' or 'worker'.* \"ps\""),
        (tf_config_of("evaluator", worker=TWO), "take the strategy 'none'.*evaluator"),
        (tf_config_of("chief", worker=TWO), "one of the 0 addresses of 'chief'"),
        (tf_config_of(index=2, worker=TWO), "of the 2 addresses .*from 0, not 2"),
        (tf_config_of(index=-1, worker=TWO), "of the 2 addresses .*from 0, not -1"),
        (tf_config_of(index=None, worker=TWO), "from 0, not null"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "multi_worker"])
def test_a_wrong_tf_config_is_refused(monkeypatch, name, text, said):
    def never() -> None:
        raise AssertionError("TensorFlow was asked")

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", never)
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(RuntimeError, match="^TF_CONFIG doesn't fit") as caught:
        tf_effopt.distribute.strategy(name)
    message = str(caught.value)
    assert re.search(said, message.partition(". Expected:")[0]), message
    assert message.endswith(f"launch --workers 2 SCRIPT. Received: TF_CONFIG={text!r}")


@pytest.mark.parametrize(
    ("text", "workers", "own"),
    [
        (tf_config_of(worker=TWO, index="1"), TWO, TWO[1]),
        (tf_config_of(worker={"1": "b:2", "0": "a:1"}), ["a:1", "b:2"], "a:1"),
        (tf_config_of(worker=["b:2"], chief=["a:1"]), ["a:1", "b:2"], "b:2"),
        (tf_config_of("chief", worker=["b:2"], chief=["a:1"]), ["a:1", "b:2"], "a:1"),
        (tf_config_of(worker=TWO, evaluator=["a:1"]), TWO, TWO[0]),
        (tf_config_of(worker=["[::1]:12345"]), ["[::1]:12345"], "[::1]:12345"),
        (tf_config_of(worker=[":0"]), [":0"], ":0"),
    ],
)
def test_what_tensorflow_allows_in_tf_config(monkeypatch, text, workers, own):
    monkeypatch.setenv("TF_CONFIG", text)
    assert tf_config.read() == tf_config.Cluster(workers, own)
    assert tf_config.named_workers() == workers


MAKE_IN_THE_RECIPE = """
from recipes import image_classification
sys.exit(image_classification.main(["--strategy", "multi_worker"]))
"""


@pytest.mark.parametrize("fault", ["port in use", "string"])
def test_the_recipe_says_what_keeps_a_worker_from_starting(tmp_path, fault):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        config = tf_config_of(worker=address if fault == "string" else [address])
        code = f"import os, sys\nos.chdir({str(tmp_path)!r})" + MAKE_IN_THE_RECIPE
        environment = {"TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": "-1"}
        process = python(code, PYTHONPATH=str(ROOT), **environment)
    assert process.returncode == 2, process.stderr
    said = (
        "TF_CONFIG doesn't fit" if fault == "string" else "TensorFlow can't listen at"
    )
    assert f"error: --strategy multi_worker: {said}" in process.stderr
    assert address in process.stderr
    assert "Traceback" not in process.stderr


def test_prepare_changes_nothing_on_one_device():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="takes a compiled model"):
        tf_effopt.distribute.prepare(model)
    model.compile(tf_effopt.Adam(), "mse")
    before = dict(vars(model))
    assert tf_effopt.distribute.prepare(model) is model
    assert vars(model) == before


# -------------------------------------------------------------------- launching


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write


def launch_script(path: str, *options: str) -> subprocess.Popen:
    # As a file, it starts without importing Keras.
    return subprocess.Popen(
        [sys.executable, launch.__file__, *options, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def test_each_worker_has_its_own_place_in_tf_config(script):
    path = script(
        "import json, os; c = json.loads(os.environ['TF_CONFIG']);"
        "print(c['task']['index'], *c['cluster']['worker'])"
    )
    out, _ = (process := launch_script(path, "--workers", "3")).communicate(timeout=60)
    assert process.returncode == 0
    lines = sorted(line for line in out.splitlines() if line.startswith("[worker"))
    assert [line[:12] for line in lines] == [f"[worker {i}] {i}" for i in range(3)]
    addresses = {line[12:] for line in lines}
    assert len(addresses) == 1
    assert len(set(addresses.pop().split())) == 3


def test_workers_get_their_gpus_of_those_that_are_visible(script, monkeypatch):
    path = script("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    options = "--workers", "2", "--gpus-per-worker", "2"
    for visible, expected in (("7,5,3,1", ["7,5", "3,1"]), (None, ["0,1", "2,3"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        out, _ = launch_script(path, *options).communicate(timeout=60)
        lines = sorted(line for line in out.splitlines() if line.startswith("[worker"))
        assert [line.split()[-1] for line in lines] == expected


RECIPE = """
import json, os, sys
from recipes import image_classification
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
options = ["--strategy", "multi_worker", "--model", "mlp", "--epochs", "1"]
sys.exit(image_classification.main([*options, "--output-dir", f"{sys.argv[1]}/{index}"]))
"""


@pytest.mark.slow
def test_the_recipe_refuses_workers_with_other_checkpoints(script, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "checkpoint.npz").write_bytes(b"of the first worker")
    command = [sys.executable, "-m", "tf_effopt.distribute.launch", "--workers", "2"]
    done = subprocess.run(
        [*command, script(RECIPE), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stdout
    assert "--output-dir must be one folder that all of them share" in done.stdout


def test_a_worker_that_fails_ends_the_others(script):
    path = script(
        "import json, os, sys, time\n"
        "first = json.loads(os.environ['TF_CONFIG'])['task']['index'] == 0\n"
        "sys.exit(7) if first else time.sleep(600)\n"
    )
    process = launch_script(path, "--workers", "2", "--grace", "2")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "[launch] worker 0 failed with exit code 7: SIGTERM to worker 1" in out


@pytest.mark.parametrize("option", ["--workers", "--grace", "--gpus-per-worker"])
def test_wrong_numbers_for_the_launcher(option, capsys):
    with pytest.raises(SystemExit):
        launch.main([option, "-1", "script.py"])
    assert f"{option} must be at least" in capsys.readouterr().err


def test_no_worker_outlives_a_launcher_that_is_killed(script):
    path = script("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    process = launch_script(path, "--workers", "2")
    said = (line for line in process.stdout if line.startswith("[worker"))
    pids = [int(next(said).split()[-1]) for _ in range(2)]
    process.kill()
    process.communicate(timeout=60)
    for pid in pids:
        assert _ends(pid), f"worker {pid} still runs"


# More than a pipe holds: it blocks where nobody reads it.
TALKATIVE = """
import sys
sys.stdout.buffer.write(b"caf\\xe9 \\xe2\\x82\\xac\\n")
sys.stdout.flush()
for i in range(20000):
    print("line", i)
sys.exit(3)
"""


def launched(path: str, output: IO[str] | int, **environment: str) -> tuple:
    """Exit code, output and errors of one worker that has an encoding of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "tf_effopt.distribute.launch", "--workers", "1", path],
        check=False,
        stdout=output,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        # As usual, Python keeps back what it prints, and tries again as it ends.
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        timeout=60,
    )
    return process.returncode, process.stdout, process.stderr.decode()


@pytest.mark.representatives("latin-1-*")
@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("latin-1", b"caf\xe9 \xe2\x82\xac"),
        ("ascii", b"caf? ???"),
        ("utf-8", "caf\ufffd \u20ac".encode()),
    ],
)
def test_what_cannot_be_encoded_is_replaced(script, encoding, expected):
    code, out, _ = launched(
        script(TALKATIVE), subprocess.PIPE, PYTHONIOENCODING=encoding
    )
    lines = [x for x in out.splitlines() if x.startswith(b"[worker 0]")]
    assert code == 3
    assert lines[-1] == b"[worker 0] line 19999"
    assert b"[worker 0] " + expected in lines


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_workers_go_on_where_their_output_cannot_be_written(script):
    with open("/dev/full", "w") as full:
        code, _, errors = launched(script(TALKATIVE), full)
    assert code == 3
    assert errors.count("[launch] The output can't be written: [Errno 28]") == 1
    assert "Exception" not in errors


def test_workers_go_on_where_nobody_reads_their_output(script):
    reading, writing = os.pipe()
    os.close(reading)
    code, _, errors = launched(script(TALKATIVE), writing)
    os.close(writing)
    assert code == 3
    assert "[launch]" not in errors
    assert "Exception" not in errors


def test_workers_go_on_where_the_output_is_closed(script, capsys):
    output = io.StringIO()
    output.close()
    command = [sys.executable, script(TALKATIVE)]
    assert launch.launch(command, 1, output=output) == 3
    assert "can't be written: I/O operation on closed file" in capsys.readouterr().err


def _ends(pid: int, seconds: float = 20) -> bool:
    for _ in range(int(seconds / 0.1)):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


# ----------------------------------------------------------- choices for a network


def test_what_compress_gradients_refuses():
    compress = tf_effopt.distribute.compress_gradients
    with pytest.raises(
        ValueError, match="'bfloat16', 'float16'. Received: dtype='int8"
    ):
        compress(tf_effopt.Adam(), "int8")
    with pytest.raises(ValueError, match="takes an optimizer of tf_effopt. Received"):
        compress(keras.optimizers.Adam())
    built = tf_effopt.Adam()
    built.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="built already: call `compress_gradients`"):
        compress(built)
    compress(tf_effopt.LossScaleOptimizer(tf_effopt.Adam()), "float16")
