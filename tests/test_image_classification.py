"""The image-classification recipe: it trains, resumes, and says what is wrong."""

import contextlib
import copy
import dataclasses
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
import resume_kills
import tensorflow as tf
import tensorflow_datasets as tfds

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes import (
    checkpoint,
    command_line,
    image_classification,
    image_data,
    image_run,
)

TIME_LIMIT = 300
SHORT = ["--epochs", "1", "--batch-size", "700"]  # two steps of digits

# Runs the recipe several times in one process, which has to start only once.
# A third entry is a file to delete before the run.
MANY = """
import contextlib, io, json, os, sys
from recipes import image_classification

results = {}
for name, arguments, *deleted in json.load(sys.stdin):
    for path in deleted:
        os.remove(path)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = image_classification.main(arguments)
    results[name] = [code, out.getvalue(), err.getvalue()]
    print(name, code, err.getvalue(), file=sys.stderr)
json.dump(results, sys.stdout)
"""


def offline(port=9):
    """An environment whose every connection ends at a port of this machine."""
    proxy = f"http://127.0.0.1:{port}"
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    environment = {**os.environ, **dict.fromkeys(names, proxy)}
    for name in ("no_proxy", "NO_PROXY"):
        environment.pop(name, None)
    return environment


def run_many(runs, data_dir):
    process = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(runs),
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        env={**offline(), "TFDS_DATA_DIR": str(data_dir)},
        timeout=TIME_LIMIT,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A TFDS folder of prepared digits, and of a small `fashion_mnist`."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

        class FashionMnist(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.0.1")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=features,
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(260),
                    "test": self._generate_examples(37),
                }

            def _generate_examples(self, count):
                random = np.random.default_rng(count)
                for i in range(count):
                    image = random.integers(0, 256, (28, 28, 1), np.uint8)
                    yield i, {"image": image, "label": i % 10}

        for builder in (
            FashionMnist(data_dir=folder),
            image_data.Digits(data_dir=folder),
        ):
            builder.download_and_prepare()
    return folder


# ------------------------------------------------------------ the default run


def test_the_default_command_reaches_97_percent_and_writes_its_results(
    tmp_path, data_dir
):
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "recipes/image_classification.py", "--output-dir", tmp_path],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TFDS_DATA_DIR": str(data_dir)},
        timeout=TIME_LIMIT,
    )
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.97
    assert metrics["steps"] == metrics["epochs"] * (1437 // 32)
    assert 0 < metrics["seconds"] < time.monotonic() - started
    assert metrics["configuration"]["dataset"] == "digits"
    assert metrics["versions"]["keras"] and metrics["hardware"]["cpu_cores"]
    assert f"{metrics['accuracy']:.2%}" in process.stdout
    for name in ("metrics.json", "curves.png", "model.keras", "checkpoint.npz"):
        assert str(tmp_path / name) in process.stdout
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = read_scalars(tmp_path / "tensorboard" / "validation")
    accuracies = [record["val_accuracy"] for record in metrics["history"]]
    np.testing.assert_allclose(written["epoch_accuracy"], accuracies, rtol=1e-6)
    assert not messages(process.stderr)


def messages(stderr):
    """The lines that a program wrote, without TensorFlow's C++ log.

    On a processor for which oneDNN is on, it tells so before its level is set.
    """
    log = re.compile(r"[IW]\d{4} |WARNING: All log messages before absl::")
    return [line for line in stderr.splitlines() if not log.match(line)]


def read_scalars(folder):
    """The values of each tag of TensorBoard's only file in a folder."""
    (path,) = folder.glob("events.out.tfevents.*")
    values = {}
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        for value in tf.compat.v1.Event.FromString(record).summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            number = float(tf.make_ndarray(value.tensor))
            values.setdefault(value.tag, []).append(number)
    return values


# ----------------------------------------------------------- two steps of each


FEW = ("SGD", "Adam", "Muon")


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("short")

    def run(name, *arguments):
        return [name, [*SHORT, *arguments, "--output-dir", str(folder / name)]]

    runs = [run(name, "--optimizer", name, "--model", "mlp") for name in FEW]
    ema = ["--model", "mlp", "--set", "use_ema=true", "--set", "ema_momentum=0.5"]
    ema += ["--early-stopping", "1"]
    remade = str(folder / "average" / "model.keras")
    runs += [
        run("cnn", "--schedule", "constant", "--warmup", "0", "--seed", "3"),
        run(
            "float16",
            *("--precision", "mixed_float16", "--optimizer", "SGD"),
            *("--set", "momentum=0.9", "--set", "nesterov=True"),
        ),
        run("average", *ema),
        ["again", run("average", *ema)[1]],
        ["ended", run("average", *ema)[1], str(folder / "average" / "metrics.json")],
        ["other", run("average", *ema, "--seed", "9")[1]],
        ["anew", run("average", *ema, "--seed", "9", "--overwrite")[1]],
        ["whole", run("average", *ema, "--seed", "9")[1], remade],
        run("diverges", "--learning-rate", "1e38", "--optimizer", "SGD"),
    ]
    return run_many(runs, data_dir), folder


def check_short_run(name, results, folder):
    code, out, err = results[name]
    assert code == 0 and not err, (name, err)
    assert "after 2 steps" in out, name
    metrics = json.loads((folder / name / "metrics.json").read_text())
    assert len(metrics["history"]) == 1


@pytest.mark.slow
def test_the_other_models_and_datasets_run(tmp_path, data_dir):
    options = {
        "resnet": ["--model", "resnet", "--precision", "mixed_bfloat16"],
        "fashion_mnist": ["--dataset", "fashion_mnist", "--batch-size", "130"],
    }
    runs = [
        [name, [*SHORT, *given, "--output-dir", str(tmp_path / name)]]
        for name, given in options.items()
    ]
    results = run_many(runs, data_dir)
    for name in options:
        check_short_run(name, results, tmp_path)
    metrics = json.loads((tmp_path / "fashion_mnist" / "metrics.json").read_text())
    assert metrics["validation_split"] == "test"


@pytest.mark.slow
def test_every_optimizer_runs(tmp_path, data_dir):
    names = set(command_line.optimizers()) - set(FEW)
    assert {"RMSprop", "SOAP"} < names
    runs = [
        [name, [*SHORT, "--optimizer", name, "--model", "mlp"]]
        for name in sorted(names)
    ]
    for name, arguments in runs:
        arguments += ["--output-dir", str(tmp_path / name)]
    results = run_many(runs, data_dir)
    for name in names:
        check_short_run(name, results, tmp_path)


def test_every_model_runs(short_runs):
    results, folder = short_runs
    for name in [*FEW, "cnn", "float16", "average"]:
        check_short_run(name, results, folder)
    metrics = json.loads((folder / "cnn" / "metrics.json").read_text())
    assert metrics["history"][0]["learning_rate"] == pytest.approx(2e-3)


def test_the_loss_scale_is_in_the_checkpoint(short_runs):
    _, arrays = checkpoint.read(short_runs[1] / "float16" / "checkpoint.npz")
    scale = next(v for k, v in arrays.items() if k.endswith("dynamic_scale"))
    assert np.log2(scale) % 1 == 0
    assert any("momentum" in name for name in arrays)


def test_a_finished_run_says_so_and_another_configuration_is_refused(short_runs):
    results = short_runs[0]
    first = results["average"][1].splitlines()[1:]  # after the epoch's line
    code, out, _ = results["again"]
    assert code == 0 and "finished already" in out and out.splitlines()[1:] == first
    # Killed after the last checkpoint: no training is left, the rest is done.
    code, out, _ = results["ended"]
    assert code == 0 and out.splitlines()[1:] == first
    code, _, err = results["other"]
    assert code == 2 and "seed: 0 there, 9 here" in err and "--overwrite" in err
    assert results["anew"][0] == 0
    # What was deleted since then is made anew, without training.
    code, out, _ = results["whole"]
    assert code == 0 and out.splitlines()[1:] == results["anew"][1].splitlines()[1:]
    assert (short_runs[1] / "average" / "model.keras").exists()


def test_a_run_that_diverges_says_so(short_runs):
    code, _, err = short_runs[0]["diverges"]
    assert code == 1 and "--learning-rate" in err and "checkpoint" in err


@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("mixed_float16", marks=pytest.mark.slow)]
)
def test_mirrored_replicas_train(tmp_path, data_dir, precision):
    # One training a process: TensorFlow's collectives don't stand a second one.
    mirrored = [*SHORT, "--strategy", "mirrored", "--output-dir", str(tmp_path)]
    results = run_many(
        [
            ["train", [*mirrored, "--precision", precision, "--seed", "1"]],
            ["again", [*mirrored, "--precision", precision, "--seed", "1"]],
        ],
        data_dir,
    )
    code, out, err = results["train"]
    assert code == 0 and "after 2 steps" in out and not err
    assert "finished already" in results["again"][1]


def run_on_jax(folder, data_dir, devices, *options):
    """The recipe on some of a CPU's logical devices."""
    return subprocess.run(
        [sys.executable, "recipes/image_classification.py", *options]
        + ["--output-dir", str(folder)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "TFDS_DATA_DIR": str(data_dir),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        timeout=TIME_LIMIT,
    )


@pytest.mark.slow
def test_on_jax_two_devices_train_as_one_does(tmp_path, data_dir):
    losses = []
    for strategy, devices in (("none", 1), ("data_parallel", 2)):
        folder = tmp_path / strategy
        options = ["--epochs", "2", "--strategy", strategy]
        process = run_on_jax(folder, data_dir, devices, *options)
        assert process.returncode == 0, process.stderr
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["replicas"] == devices
        losses.append([epoch["loss"] for epoch in metrics["history"]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


@pytest.mark.slow
def test_on_jax_devices_evaluate_what_they_cannot_share(tmp_path, data_dir):
    """360 validation images on 16 devices; --batch-size has to be a multiple."""
    folder = tmp_path / "run"
    options = ["--model", "mlp", "--epochs", "1", "--strategy", "data_parallel"]
    process = run_on_jax(folder, data_dir, 16, *options, "--batch-size", "40")
    assert process.returncode == 2
    assert "--batch-size must be a multiple of 16" in process.stderr
    assert not folder.exists()
    process = run_on_jax(folder, data_dir, 16, *options, "--batch-size", "32")
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "metrics.json").read_text())
    assert results["replicas"] == 16
    # On one device, by Keras without a distribution.
    model = keras.models.load_model(folder / "model.keras")
    data = image_data.load("digits", str(data_dir), None)
    loss, accuracy = model.evaluate(
        data.validation_images, data.validation_labels, batch_size=360, verbose=0
    )
    assert results["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert results["loss"] == pytest.approx(loss, rel=1e-5)


# ------------------------------------------------------------------ bad input


FOLDERS = ("partial", "broken", "unreadable", "foreign", "nested", "file")
BAD_INPUT = {
    "optimizer": (
        ["--optimizer", "AdmaW"],
        ["no optimizer 'AdmaW'", "Did you mean AdamW?", "RMSprop"],
    ),
    "optimizer base": (["--optimizer", "Optimizer"], ["no optimizer 'Optimizer'"]),
    "wrapper": (["--optimizer", "LossScaleOptimizer"], ["Expected one of: "]),
    "dataset": (
        ["--dataset", "fasion-mnist"],
        ["no dataset 'fasion-mnist'", "fashion_mnist", "digits"],
    ),
    "namespace": (["--dataset", "huggingface:mnist"], ["no dataset"]),
    "text set": (["--dataset", "imdb_reviews"], ["imdb_reviews", "--data-dir"]),
    "key": (
        ["--set", "beta2=0.99"],
        ["AdamW has no argument 'beta2'", "Did you mean beta_2?", "clipnorm"],
    ),
    "range": (
        ["--set", "beta_2=1.5"],
        ["`beta_2` must be in [0, 1)", "Received: beta_2=1.5"],
    ),
    "type": (["--set", "amsgrad=maybe"], ["`amsgrad` must be True or False", "maybe"]),
    "no value": (["--set", "beta_2"], ["KEY=VALUE", "beta_2"]),
    "rate by set": (["--set", "learning_rate=1"], ["--learning-rate"]),
    "rate": (["--learning-rate", "-1"], ["`learning_rate`", "-1"]),
    "model": (["--model", "vit"], ["'vit'", "resnet"]),
    "option": (["--optimzer", "SGD"], ["no option '--optimzer'", "--optimizer?"]),
    "number": (["--epochs", "many"], ["--epochs", "'many'"]),
    "epochs": (["--epochs", "0"], ["--epochs must be at least 1", "0"]),
    "warm-up": (["--warmup", "2"], ["--warmup must be in [0, 1]", "2"]),
    "batch": (["--batch-size", "5000"], ["at most 1437", "5000"]),
    "replicas": (["--replicas", "2"], ["--strategy mirrored"]),
    "strategy": (["--strategy", "tpu"], ["--strategy tpu: ", "built without TPUs"]),
    "backend": (["--strategy", "data_parallel"], ["KERAS_BACKEND=jax"]),
    "seed": (["--seed", "-1"], ["--seed must be in", "-1"]),
    "cifar10": (
        ["--dataset", "cifar10"],
        [
            "'cifar10' isn't prepared",
            "--data-dir",
            "cifar-10-binary.tar.gz",
            "internet",
        ],
    ),
    "partial": (
        ["--dataset", "fashion_mnist", "--data-dir", "{partial}"],
        ["it has train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"],
    ),
    "broken": (
        ["--dataset", "fashion_mnist", "--data-dir", "{broken}"],
        ["Preparing fashion_mnist from the files in {broken}", "failed", "checksum"],
    ),
    "checkpoint": (
        ["--output-dir", "{unreadable}"],
        ["can't be read as a checkpoint", "--overwrite"],
    ),
    "results": (
        ["--output-dir", "{foreign}"],
        ["metrics.json can't be read as the results", "--overwrite"],
    ),
    "folder": (
        ["--output-dir", "{nested}"],
        ["checkpoint.npz can't be read as a checkpoint", "directory", "Move it away."],
    ),
    "folder anew": (
        ["--overwrite", "--output-dir", "{nested}"],
        ["--overwrite can't delete {nested}", "Move it away", "--output-dir"],
    ),
    "output": (["--output-dir", "{file}"], ["--output-dir"]),
    "output anew": (
        ["--overwrite", "--output-dir", "{file}/sub"],
        ["--output-dir can't be made", "Not a directory"],
    ),
}


@pytest.fixture(scope="module")
def bad_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    folders = {name: str(root / name) for name in FOLDERS}
    for name in ("partial", "broken", "unreadable", "foreign", "nested"):
        Path(folders[name]).mkdir()
    Path(folders["foreign"], "metrics.json").write_text('{"accu')
    Path(folders["nested"], "checkpoint.npz").mkdir()
    Path(folders["file"]).write_text("not a folder")
    Path(folders["unreadable"], "checkpoint.npz").write_bytes(b"PK")
    files = [
        info.filename for info in tfds.builder_cls("fashion_mnist").url_infos.values()
    ]
    for name in files:
        Path(folders["broken"], name).write_bytes(b"no archive")
    Path(folders["partial"], "train-labels-idx1-ubyte.gz").write_bytes(b"no archive")
    fill = lambda texts: [text.format(**folders) for text in texts]
    runs = [
        [
            name,
            [
                *fill(given),
                *(
                    ["--output-dir", str(root / "out")]
                    * ("{" not in given[-1] or "data" in given[-2])
                ),
            ],
        ]
        for name, (given, _) in BAD_INPUT.items()
    ]
    return run_many(runs, root / "data"), fill


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named_and_mended(bad_runs, name):
    results, fill = bad_runs
    code, _, err = results[name]
    assert code == 2
    assert err.startswith("image_classification: error: ") and err.count("\n") == 1
    for expected in fill(BAD_INPUT[name][1]):
        assert expected.lower() in err.lower(), (expected, err)


@pytest.mark.parametrize("strategy", ["none", "mirrored", "data_parallel"])
def test_other_backends_are_refused(strategy):
    with pytest.raises(command_line.UsageError, match="tensorflow or jax.*torch"):
        image_classification.check_backend("torch", strategy)


def test_each_backend_has_its_strategies():
    for backend, strategy in (
        *(("jax", "none"), ("jax", "data_parallel")),
        *(("tensorflow", "none"), ("tensorflow", "mirrored")),
    ):
        image_classification.check_backend(backend, strategy)
    for backend, strategy in (("jax", "mirrored"), ("tensorflow", "data_parallel")):
        with pytest.raises(command_line.UsageError, match=f"{strategy} with {backend}"):
            image_classification.check_backend(backend, strategy)


def test_devices_that_cannot_share_a_batch_are_refused():
    devices = mock.Mock(replicas=3)
    devices.name = "data_parallel"
    image_classification.check_shares(33, devices)
    with pytest.raises(command_line.UsageError, match="multiple of 3.*Received: 32"):
        image_classification.check_shares(32, devices)
    devices.name = "mirrored"  # whose replicas may get unequal parts
    image_classification.check_shares(32, devices)


def test_a_dead_network_is_noticed_within_seconds(tmp_path):
    """A connection that is accepted and then never answered."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        code = "import time; from recipes import image_data\n"
        code += "start = time.monotonic()\n"
        code += "try: image_data.load('cifar10', None, None)\n"
        code += "except image_data.DatasetError as error: print(error)\n"
        code += "print(time.monotonic() - start)"
        environment = offline(server.getsockname()[1])
        process = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            text=True,
            cwd=ROOT,
            env={**environment, "TFDS_DATA_DIR": str(tmp_path)},
            timeout=60,
        )
    message, seconds = process.stdout.strip().splitlines()
    assert "can't be reached" in message
    assert float(seconds) < 15


# -------------------------------------------------------------------- resume


@pytest.mark.slow
def test_two_kills_leave_no_trace(tmp_path, data_dir):
    """For 20: python tests/resume_kills.py --kills 20"""
    kills = [resume_kills.Kill(1, fraction=0.4), resume_kills.Kill(1, fraction=None)]
    options = ["--epochs", "10", "--data-dir", str(data_dir)]
    different, _ = resume_kills.compare(kills, options, tmp_path)
    assert different == []
    log = (tmp_path / "rough.log").read_text()
    assert log.count("Going on after epoch") == 2


@pytest.mark.slow
def test_kills_of_one_of_two_workers_lose_nothing_and_end_the_other(tmp_path, data_dir):
    """For 20: python tests/resume_kills.py --kills 20 --workers 2"""
    kills = [
        resume_kills.Kill(1, fraction=0.4, victim=0.9),
        resume_kills.Kill(1, fraction=None, victim=0.0),
    ]
    options = ["--epochs", "12", "--data-dir", str(data_dir)]
    different, _ = resume_kills.compare(kills, options, tmp_path, workers=2)
    assert different == []


def interrupted(folder, options, workers=1, checkpoints=1):
    """Runs the recipe until a checkpoint, then ends it by SIGTERM; returns its output."""
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    process = resume_kills.start(folder, options, workers)
    try:
        for _ in range(checkpoints):
            before = resume_kills.identity(folder / "checkpoint.npz")
            resume_kills.wait_for(
                process,
                lambda: resume_kills.identity(folder / "checkpoint.npz") != before,  # noqa: B023
            )
        # One worker of several: the others have to be told.
        os.kill(resume_kills.processes(process, workers)[-1], signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_saves_within_an_epoch_and_the_bits_are_the_same(
    tmp_path, data_dir, workers
):
    options = ["--epochs", "8", "--data-dir", str(data_dir)]
    resume_kills.complete(tmp_path / "smooth", options, workers)
    said = interrupted(tmp_path / "rough", options, workers, checkpoints=2)
    header, _ = checkpoint.read(tmp_path / "rough" / "checkpoint.npz")
    assert header["progress"]["batches"] > 0
    progress = image_run.Progress(**header["progress"])
    ended = re.findall("Ended by SIGTERM. The checkpoint of (.*) stands", said)
    assert ended == [str(progress)] * workers
    resume_kills.complete(tmp_path / "rough", options, workers)
    different = resume_kills.differences(tmp_path / "smooth", tmp_path / "rough")
    if workers > 1:  # The logged loss is summed up in another order.
        different = [x for x in different if not x.endswith("/history")]
    assert different == []


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy(tmp_path, data_dir):
    """Two replicas, then one device, then two workers, then one device."""
    folder = tmp_path / "run"
    options = ["--epochs", "40", "--data-dir", str(data_dir)]
    interrupted(folder, ["--strategy", "mirrored", *options])
    said = interrupted(folder, options)
    assert "Going on after epoch 1" in said
    said = interrupted(folder, options, workers=2)
    assert "Going on after epoch" in said
    resume_kills.complete(folder, options)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["history"]) == 40
    assert metrics["accuracy"] > 0.95
    assert metrics["steps"] == 40 * (1437 // 64)


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.npz"
    checkpoint.write(path, {"epoch": 1}, {"w": np.arange(3.0)})

    def killed(*_):
        raise KeyboardInterrupt

    for moment in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint.os, moment, killed)
            checkpoint.write(path, {"epoch": 2}, {"w": np.zeros(3)})
        header, arrays = checkpoint.read(path)
        assert header == {"epoch": 1} and arrays["w"].tolist() == [0.0, 1.0, 2.0]
    checkpoint.write(path, {"epoch": 2}, {"w": np.zeros(3)})
    assert checkpoint.read(path)[0] == {"epoch": 2}
    assert list(tmp_path.iterdir()) == [path]


def small_model():
    # Named, since others would be numbered from one model to the next.
    dense = keras.layers.Dense(1, name="dense")
    model = keras.Sequential([keras.Input((2,)), dense], name="small")
    model.compile(optimizer=keras.optimizers.SGD(name="sgd"), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


RECORD = {
    "epoch": 1,
    "learning_rate": 0.1,
    "seconds": 1.0,
    **dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), 0.5),
}


def test_what_stands_is_what_the_file_holds(tmp_path, monkeypatch):
    run = image_run.Run(tmp_path, {})
    assert image_classification.last_checkpoint(run) == "There is no checkpoint yet."
    run.progress.history.append(RECORD)
    run.save(small_model())

    def interrupt(*_):
        raise KeyboardInterrupt

    run.progress.history.append(RECORD)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.os, "fsync", interrupt)
        run.save(small_model())
    assert "The checkpoint of epoch 1 stands" in run.standing()
    # Before it is read, too: while the data are loaded.
    assert image_run.Run(tmp_path, {}).standing() == run.standing()
    run.progress.batches = 3
    run.save(small_model())
    said = image_classification.last_checkpoint(run)
    assert said.startswith("The checkpoint of epoch 2 and 3 batches stands: ")
    run.checkpoint.write_bytes(b"PK")
    assert "can't be read as a checkpoint" in run.standing()


@contextlib.contextmanager
def file_size_limit(size):
    """As on a disk that is full: what is longer can't be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_a_checkpoint_leaves_the_one_before(tmp_path):
    run = image_run.Run(tmp_path, {})
    run.progress.history.append(RECORD)
    run.save(small_model())
    run.progress.history.append(RECORD)
    with file_size_limit(100), pytest.raises(image_run.TrainingFailed) as caught:
        run.save(small_model())
    assert f"{run.checkpoint} can't be written" in str(caught.value)
    assert "File too large" in str(caught.value)
    assert "checkpoint of epoch 1 stands" in run.standing()
    assert list(tmp_path.iterdir()) == [run.checkpoint]


@pytest.mark.parametrize("name", ["model.keras", "curves.png", "metrics.json"])
def test_no_space_for_results_leaves_no_half_file(tmp_path, name, monkeypatch):
    run = image_run.Run(tmp_path, {})
    run.progress.history.append(RECORD)
    model = small_model()

    if name != "model.keras":
        monkeypatch.setattr(model, "save", lambda path: path.write_text("x"))
    if name == "metrics.json":
        monkeypatch.setattr(image_run, "plot", lambda _, path: path.write_text("x"))
    with file_size_limit(100), pytest.raises(image_run.TrainingFailed) as caught:
        run.write_results(model, {"accuracy": 0.5})
    assert f"{tmp_path / name} can't be written" in str(caught.value)
    assert not list(tmp_path.glob("*.tmp*")) and not (tmp_path / name).exists()


def test_curves_that_cannot_be_written_are_named(tmp_path):
    run = image_run.Run(tmp_path, {})
    run.logs.write_text("not a folder")
    with pytest.raises(image_run.TrainingFailed, match=r"is not a directory\)"):
        image_run.Saving(run, None, lambda: False).on_train_begin()


NOT_WHOLE = {
    "no configuration": lambda header: header.pop("configuration"),
    "no progress": lambda header: header.pop("progress"),
    "configuration": lambda header: header.update(configuration=5),
    "another version": lambda header: header["progress"].update(more=1),
    "an older version": lambda header: header["progress"].pop("waited"),
    "history": lambda header: header["progress"].update(history=5),
    "records": lambda header: header["progress"].update(history=[{"epoch": 1}]),
}


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A checkpoint's header and arrays."""
    run = image_run.Run(tmp_path_factory.mktemp("saved"), {"seed": 1})
    run.progress.history.append(RECORD)
    run.save(small_model())
    return checkpoint.read(run.checkpoint)


@pytest.mark.parametrize("name", [None, "a list", *NOT_WHOLE])
def test_a_header_that_is_not_whole_is_no_checkpoint(tmp_path, saved_run, name):
    header, arrays = copy.deepcopy(saved_run)
    if name in NOT_WHOLE:
        NOT_WHOLE[name](header)
    run = image_run.Run(tmp_path, {"seed": 1})
    checkpoint.write(run.checkpoint, [1] if name == "a list" else header, arrays)
    if name is None:
        run.restore(small_model())
        assert run.epochs == 1
        return
    with pytest.raises(checkpoint.CheckpointError, match="can't be read.*--overwrite"):
        run.restore(small_model())
    assert "can't be read" in run.standing()


def test_arrays_of_another_shape_are_named(tmp_path, saved_run):
    header, arrays = copy.deepcopy(saved_run)
    kernel = next(name for name in arrays if name.endswith("kernel"))
    arrays[kernel] = np.arange(200.0)
    run = image_run.Run(tmp_path, {"seed": 1})
    checkpoint.write(run.checkpoint, header, arrays)
    expected = rf"{kernel} is of shape \(200,\) there, \(2, 1\) here.*--overwrite"
    with pytest.raises(checkpoint.CheckpointError, match=expected) as caught:
        run.restore(small_model())
    assert len(str(caught.value)) < 250


def test_sums_of_an_epoch_that_are_not_whole_are_refused(tmp_path):
    run = image_run.Run(tmp_path, {})
    run.metrics_so_far = {"000/loss": np.zeros(())}
    saving = image_run.Saving(run, None, lambda: False)
    saving.set_model(small_model())
    with pytest.raises(checkpoint.CheckpointError, match="only one of the two has"):
        saving.on_train_batch_end(0)


def test_results_that_are_not_whole_are_refused(tmp_path, capsys):
    run = image_run.Run(tmp_path, {"seed": 1})
    results = {"configuration": {"seed": 1}, "accuracy": 0.5, "seconds": 1.0}
    results |= {"validation_examples": 360, "steps": 2}
    run.metrics.write_text(json.dumps(results))
    # A finished run keeps its results; what was deleted is named.
    assert run.finished() == results
    image_classification.report(run, results)
    assert f"{run.model}  (deleted" in capsys.readouterr().out
    # But it is made from the checkpoint, where there is one.
    run.checkpoint.touch()
    assert run.finished() is None
    for name in results:
        less = {k: v for k, v in results.items() if k != name}
        run.metrics.write_text(json.dumps(less))
        with pytest.raises(checkpoint.CheckpointError, match=f"no '{name}'"):
            run.finished()
    for text in ("[]", "5", '{"configuration": 5}'):
        run.metrics.write_text(text)
        with pytest.raises(checkpoint.CheckpointError, match="can't be read"):
            run.finished()


# ---------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def images():
    """Images that tell their number: no two are equal, shifted or mirrored."""
    count = 50
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 1), np.uint8)
    numbers = np.arange(count, dtype=np.int32)
    return image_data.ImageData(pixels, numbers, pixels[:37], numbers[:37], 50, "test")


def epoch_by_number(images, epochs, batch_size=10, seed=0):
    """Each epoch as a list of (number, image)."""
    augmentation = image_data.Augmentation(shift=2, flip=True)
    batches = image_data.training_batches(
        images, augmentation, batch_size, seed, epochs
    )
    pairs = [
        (int(number), image.tobytes())
        for batch, labels in batches.as_numpy_iterator()
        for image, number in zip(batch, labels, strict=True)
    ]
    size = len(pairs) // len(epochs)
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def test_order_and_augmentation_follow_from_seed_epoch_and_number(images):
    first, second, third = epoch_by_number(images, range(3))
    assert sorted(number for number, _ in first) == list(range(50))
    orders = [[number for number, _ in epoch] for epoch in (first, second, third)]
    assert orders[0] != orders[1] != orders[2]
    assert dict(first) != dict(second)  # other shifts
    assert epoch_by_number(images, range(2, 3)) == [third]  # taken up at epoch 2
    assert epoch_by_number(images, range(1), batch_size=25) == [first]
    assert epoch_by_number(images, range(1), seed=1) != [first]


def test_augmentation_shifts_and_mirrors(images):
    draws = np.array([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1], [0.0, 0.99, 0.9]], np.float32)
    pixels = images.train_images[:3]
    augmentation = image_data.Augmentation(shift=1, flip=True)
    result = augmentation(tf.constant(pixels), tf.constant(draws)).numpy()
    np.testing.assert_array_equal(result[0], pixels[0])
    np.testing.assert_array_equal(result[1], pixels[1][:, ::-1])
    np.testing.assert_array_equal(result[2][1:, :-1], pixels[2][:-1, 1:])
    assert not result[2][0].any() and not result[2][:, -1].any()


@pytest.mark.parametrize(
    ("count", "replicas", "sizes"),
    [
        (36, 1, [9] * 4),
        (36, 3, [9] * 4),
        (36, 4, [10, 10, 10, 6]),  # 4 * 9 would be parts of a fraction
        (32, 4, [8] * 4),
        (37, 1, [10, 10, 10, 7]),
        (37, 2, [9, 9, 9, 9, 1]),  # as a whole for each device of JAX
        (8, 3, [8]),
        (8, 2, [8]),
    ],
)
def test_validation_batches_are_equal_where_they_can_be(images, count, replicas, sizes):
    part = dataclasses.replace(
        images,
        validation_images=images.validation_images[:count],
        validation_labels=images.validation_labels[:count],
    )
    batches = image_data.validation_batches(part, replicas, largest_batch=10)
    labels = [labels for _, labels in batches.as_numpy_iterator()]
    assert [len(x) for x in labels] == sizes
    assert np.concatenate(labels).tolist() == part.validation_labels.tolist()


def test_digits_are_split_evenly_over_the_classes(data_dir):
    digits = image_data.load("digits", str(data_dir), None)
    assert digits.image_shape == (8, 8, 1) and digits.train_images.max() == 255
    train, validation = (
        np.bincount(digits.train_labels),
        np.bincount(digits.validation_labels),
    )
    assert train.sum() + validation.sum() == 1797 and validation.sum() == 360
    assert np.abs(validation / (train + validation) - 0.2).max() < 0.01
