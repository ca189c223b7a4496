"""Image-classification sets: found or prepared without a hang, fed in order.

Everything random about the training data is a function of the seed, the epoch
and the example's number, so that a run can be taken up at any epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import logging
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

LARGEST_SET = 8 * 1024**3  # bytes: sets are held in memory
DEFAULT_IMAGE_SIZE = 64  # for sets whose images differ in size
REACHABILITY_SECONDS = 4.0

if not hasattr(tfds, "core"):  # it logs what went wrong on import, and goes on
    raise ImportError(
        "tensorflow_datasets couldn't be loaded: its error is logged above. With "
        'TensorFlow 2.19, `pip install "tensorflow-metadata<1.18"`.'
    )


class DatasetError(Exception):
    """A dataset can't be had, or isn't one of labelled images."""


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 handwritten digits that come with scikit-learn."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8x8 pixels out of scikit-learn: the "
            "test part of UCI's 'Optical Recognition of Handwritten Digits'.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from sklearn.model_selection import train_test_split

        train, validation = train_test_split(
            np.arange(len(self._digits().target)),
            test_size=0.2,
            stratify=self._digits().target,
            random_state=0,
        )
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(self, indices: np.ndarray) -> Any:
        digits = self._digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for i in indices:
            yield int(i), {"image": images[i], "label": int(digits.target[i])}

    @staticmethod
    def _digits() -> Any:
        from sklearn.datasets import load_digits

        return load_digits()


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A set in memory: uint8 images of shape (n, height, width, channels)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    classes: int
    validation_split: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train_images.shape[1:]


# ------------------------------------------------------------ finding a set


def load(name: str, data_dir: str | None, image_size: int | None) -> ImageData:
    """Loads a set, which is prepared first if need and possibility be.

    Args:
        name: `"digits"`, or any image-classification set of TFDS.
        data_dir: None, or a folder of prepared sets or of a set's manual files.
        image_size: None, or the height and width to scale all images to.

    Raises:
        DatasetError: the set isn't known, can't be had, or isn't fit.
    """
    tfds.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS's chatter
    builder = find(name, data_dir)
    try:
        return _in_memory(builder, image_size)
    except (OSError, tf.errors.OpError) as error:
        raise DatasetError(
            f"The prepared dataset in {builder.data_dir} can't be read: "
            f"{_first_line(error)}. Delete that folder to prepare it anew."
        ) from error


def find(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns a set's builder, prepared; never waits for a dead network."""
    if re.split("[:/]", name)[0] == "digits":
        if name != "digits":
            raise DatasetError(
                f"The dataset digits has no versions and configurations. Pass "
                f"--dataset digits. Received: {name!r}"
            )
        builder = Digits(data_dir=data_dir)
        if builder.is_prepared():
            return builder
        _prepare(builder, manual_dir=None)
        return Digits(data_dir=data_dir)
    _check_known(name, data_dir)
    folders = [data_dir, None] if data_dir else [None]  # None: TFDS's default
    try:
        builders = [tfds.builder(name, data_dir=folder) for folder in folders]
    except (AssertionError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{name!r} isn't a version or configuration of a dataset: "
            f"{_first_line(error)}. Expected: NAME, NAME/CONFIG or NAME:VERSION, as in "
            "https://www.tensorflow.org/datasets/catalog/overview."
        ) from error
    for builder in builders:
        if builder.is_prepared():
            return builder
    # A folder of manual files is left as it is: what is made of them goes to
    # TFDS's default folder. Downloads go where the user said.
    present, missing = _manual_files(builders[0], data_dir)
    builder = builders[-1] if present else builders[0]
    if missing or not present:
        _check_internet(name, builder, data_dir, present, missing)
    _prepare(builder, manual_dir=data_dir if present else None)
    return builder


def _check_known(name: str, data_dir: str | None) -> None:
    base = re.split("[:/]", name)[0]
    known = sorted({"digits", *tfds.list_builders(with_community_datasets=False)})
    if base in known or (data_dir and base and (Path(data_dir) / base).is_dir()):
        return
    near = difflib.get_close_matches(base.lower().replace("-", "_"), known, n=3)
    raise DatasetError(
        f"There is no dataset {name!r}."
        + (f" Did you mean {' or '.join(near)}?" if near else "")
        + " Expected: digits, fashion_mnist, cifar10, or another "
        "image-classification set of TensorFlow Datasets "
        "(https://www.tensorflow.org/datasets/catalog/overview)."
    )


def _manual_files(
    builder: tfds.core.DatasetBuilder, folder: str | None
) -> tuple[list[str], list[str]]:
    """Which of a set's downloads lie in `folder`, and which don't."""
    names = [info.filename for info in (builder.url_infos or {}).values()]
    if folder is None:
        return [], names
    # A set without listed downloads reads what its folder holds by itself.
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and Path(folder).is_dir():
        return [path.name for path in Path(folder).iterdir()], []
    present = [n for n in names if n and (Path(folder) / n).is_file()]
    return present, [n for n in names if n not in present]


def _check_internet(
    name: str,
    builder: tfds.core.DatasetBuilder,
    data_dir: str | None,
    present: list[str],
    missing: list[str],
) -> None:
    """Raises `DatasetError` at once where TFDS would retry for minutes."""
    url = next(iter(builder.url_infos or {}), "https://storage.googleapis.com")
    if _answers(url):
        return
    searched = f"in --data-dir {data_dir} or " if data_dir else "in "
    found = f" (it has {', '.join(present)})" if present else ""
    files = ", ".join(n for n in missing if n) or "the files its catalogue page names"
    raise DatasetError(
        f"The dataset {name!r} isn't prepared {searched}{tfds.core.constants.DATA_DIR}"
        f", and {urllib.request.urlparse(url).netloc} can't be reached to download it. "
        "Ways to get it: (1) --data-dir with the data_dir of a machine where it is "
        f"prepared; (2) --data-dir with a folder of its manual files{found}: {files}; "
        f'(3) on a machine with internet, `python -c "import tensorflow_datasets as '
        f"tfds; tfds.load('{name}', data_dir='data')\"`, then copy the folder data "
        "here and pass --data-dir data. --dataset digits needs no download."
    )


def _answers(url: str) -> bool:
    """Whether anything answers at `url`, within a few seconds."""
    reached = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=REACHABILITY_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # An answer, too.
        except (OSError, ValueError):
            return
        reached.set()

    # In a thread, since looking up a name knows no time limit.
    threading.Thread(target=ask, daemon=True).start()
    return reached.wait(REACHABILITY_SECONDS)


def _prepare(builder: tfds.core.DatasetBuilder, manual_dir: str | None) -> None:
    source = f" from the files in {manual_dir}" if manual_dir else ""
    print(f"Preparing {builder.name}{source} in {builder.data_dir}", flush=True)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except Exception as error:
        if builder.is_prepared():
            return  # by another process, meanwhile
        raise DatasetError(
            f"Preparing {builder.name}{source} failed: {_first_line(error)}. See "
            f"https://www.tensorflow.org/datasets/catalog/{builder.name}"
        ) from error


# ------------------------------------------------------------ reading a set


def _in_memory(builder: tfds.core.DatasetBuilder, image_size: int | None) -> ImageData:
    image_key, label_key = _check_fit(builder)
    info = builder.info
    shape = info.features[image_key].shape
    size = (image_size, image_size) if image_size else shape[:2]
    if None in size:
        size = (DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE)
    bytes_each = size[0] * size[1] * (shape[2] or 3)
    if info.splits["train"].num_examples * bytes_each > LARGEST_SET:
        raise DatasetError(
            f"{builder.name} has {info.splits['train'].num_examples:,} training "
            f"images, too many to hold in memory at {size[0]}x{size[1]}. Pass a "
            f"smaller --image-size, or a part of it prepared as a set of its own."
        )

    def prepare(example: dict[str, Any]) -> tuple[tf.Tensor, tf.Tensor]:
        image = example[image_key]
        if tuple(size) != tuple(shape[:2]):
            scaled = tf.image.resize(image, size, antialias=True)
            image = tf.cast(tf.clip_by_value(tf.round(scaled), 0, 255), tf.uint8)
        return image, example[label_key]

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        # One file after the other: the same order on every machine.
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        examples = builder.as_dataset(
            split=split, shuffle_files=False, read_config=in_order
        )
        batches = examples.map(prepare, tf.data.AUTOTUNE).batch(1024)
        images, labels = zip(*batches.as_numpy_iterator(), strict=True)
        return np.concatenate(images), np.concatenate(labels).astype(np.int32)

    train, validation = _splits(info.splits)
    return ImageData(
        *read(train),
        *read(validation),
        classes=info.features[label_key].num_classes,
        validation_split=validation,
    )


def _check_fit(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Returns the names of the image and of its label."""
    features = builder.info.features
    keys = builder.info.supervised_keys or ("image", "label")
    if isinstance(features, tfds.features.FeaturesDict) and len(keys) == 2:
        kinds = tfds.features.Image, tfds.features.ClassLabel
        fit = all(
            key in features and isinstance(features[key], kind)
            for key, kind in zip(keys, kinds, strict=True)
        )
        if fit and "train" in builder.info.splits:
            return keys
    raise DatasetError(
        f"{builder.name} isn't an image-classification set: it needs a split 'train', "
        "an image and a class label. It has the splits "
        f"{list(builder.info.splits)} and the features {list(features or ())}."
    )


def _splits(splits: Any) -> tuple[str, str]:
    for name in ("validation", "test"):
        if name in splits:
            return "train", name
    return "train[:90%]", "train[90%:]"


# ----------------------------------------------------------- feeding a model


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random shifts of up to `shift` pixels, and mirror images if `flip`."""

    shift: int = 0
    flip: bool = False

    def __call__(self, images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Augments a batch.

        Args:
            images: of shape (batch, height, width, channels).
            draws: of shape (batch, 3), uniform in [0, 1), each example's own.
        """
        if self.shift:
            images = self._shifted(images, draws)
        if self.flip:
            flips = draws[:, 2, None, None, None] < 0.5
            images = tf.where(flips, images[:, :, ::-1], images)
        return images

    def _shifted(self, images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        height, width = images.shape[1:3]
        margin = [self.shift, self.shift]
        padded = tf.pad(images, [[0, 0], margin, margin, [0, 0]])
        corners = tf.cast(draws[:, :2] * (2 * self.shift + 1), tf.int32)
        rows = corners[:, :1] + tf.range(height)
        columns = corners[:, 1:] + tf.range(width)
        padded = tf.gather(padded, rows, axis=1, batch_dims=1)
        return tf.gather(padded, columns, axis=2, batch_dims=1)


def training_batches(
    data: ImageData,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    epochs: range,
    skip: int = 0,
) -> tf.data.Dataset:
    """Returns the batches of `epochs`, one epoch after the other.

    Each epoch is a permutation of the examples without the last, smaller batch; of
    the first one `skip` batches are left out.
    """
    images, labels = tf.constant(data.train_images), tf.constant(data.train_labels)
    count = len(data.train_images)

    def batches_of(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(count), seed=tf.stack([np.int64(seed), 2 * epoch])
        )
        # Row i belongs to example i, wherever the permutation puts it.
        draws = tf.random.stateless_uniform(
            [count, 3], seed=tf.stack([np.int64(seed), 2 * epoch + 1])
        )

        def batch_of(indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            batch = tf.gather(images, indices)
            return (
                augmentation(batch, tf.gather(draws, indices)),
                tf.gather(labels, indices),
            )

        indices = tf.data.Dataset.from_tensor_slices(order)
        indices = indices.batch(batch_size, drop_remainder=True)
        is_first = tf.cast(epoch == epochs.start, tf.int64)
        indices = indices.skip(skip * is_first)
        return indices.map(batch_of, tf.data.AUTOTUNE)

    numbers = tf.data.Dataset.range(epochs.start, epochs.stop)
    return numbers.flat_map(batches_of).prefetch(tf.data.AUTOTUNE)


def validation_batches(
    data: ImageData, replicas: int, largest_batch: int = 1000
) -> tf.data.Dataset:
    """Returns the validation images in order, each exactly once.

    In equal batches of equal parts for all replicas, if there are such of a fair size.
    If not, the first batch has no equal parts: Keras lays out all batches on JAX's
    devices as the first, and the last, smaller one needn't have such parts.
    """
    count = len(data.validation_images)
    largest = min(count, largest_batch)
    sizes = range(largest, largest // 2, -1)
    equal = (n for n in sizes if count % n == n % replicas == 0)
    unequal = (n for n in sizes if n % replicas)
    batch_size = next(equal, next(unequal, largest))
    pairs = (data.validation_images, data.validation_labels)
    return tf.data.Dataset.from_tensor_slices(pairs).batch(batch_size).prefetch(2)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
