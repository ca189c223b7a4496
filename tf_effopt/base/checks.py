"""Checks of what the user passes: errors say what is expected, and how to fix it."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable
from typing import Any

import keras

from tf_effopt.base.stage import OF_AVERAGING, OF_TRANSFORMS, Stage
from tf_effopt.runtime.sparse_input import is_sparse, with_tensors
from tf_effopt.state.precision import MANTISSA_BITS
from tf_effopt.state.variables import dtype_name, is_variable, path_of


def checked_transforms(transforms: Any) -> tuple[Stage, ...]:
    """The stages on the gradient or the update, as a tuple."""
    wrong = not isinstance(transforms, list | tuple)
    bad = transforms if wrong else _not_at(OF_TRANSFORMS, transforms)
    if wrong or bad:
        raise ValueError(
            "`transforms` must be a list of instances of "
            "`tf_effopt.transforms.Transform`, or of `tf_effopt.Stage` on what is sent, "
            "the gradient or the update, each for this optimizer only. Stages on "
            f"weights are passed in `averaging`. Received: {bad!r}"
        )
    return tuple(transforms)


def checked_averaging(averaging: Any, use_ema: Any) -> tuple[Stage, ...]:
    """The stages on the weights, one or a list or None, as a tuple."""
    if averaging is None:
        return ()
    given = averaging if isinstance(averaging, list | tuple) else [averaging]
    bad = _not_at(OF_AVERAGING, given)
    if bad:
        raise ValueError(
            "`averaging` must be a stage on the weights, such as "
            "`tf_effopt.averaging.Lookahead()`, or a list of them, each for this "
            "optimizer only. Stages on the gradient or the update are passed in "
            f"`transforms`. Received: {bad!r}"
        )
    if given and use_ema:
        raise ValueError(
            "`averaging` and `use_ema=True` can't be combined: both say which average "
            f"of the weights there is. Leave one out. Received: averaging={given!r}"
        )
    return tuple(given)


def _not_at(places: tuple[str, ...], stages: Any) -> list[Any]:
    """Those that aren't new stages at these places."""
    return [
        x
        for x in stages
        if not isinstance(x, Stage)
        or x.built
        or not all(f.where in places for f in x.functions())
    ]


def as_int(value: Any) -> Any:
    """NumPy's integers as Python's, which Keras asks for."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_integer else value


def checked_variables(variables: Any) -> list[Any]:
    """A list of distinct variables."""
    wrong = not isinstance(variables, Iterable) or is_variable(variables)
    variables = [variables] if wrong else list(variables)
    if wrong or not all(map(is_variable, variables)):
        raise ValueError(
            "`trainable_variables` must be a list of variables, such as "
            "`model.trainable_variables`, as the second argument of `apply`. "
            f"Received: {_shown(variables)}"
        )
    if len({id(v) for v in variables}) < len(variables):
        seen: set[int] = set()
        twice = [path_of(v) for v in variables if id(v) in seen or seen.add(id(v))]
        raise ValueError(
            "Each variable must be given once, also one that several layers share: "
            "list it once, with the gradient that `tape.gradient` (or `jax.grad`, "
            "or `.grad`) gives for it, which is the sum over all its uses already. "
            f"Received twice: {twice}"
        )
    return variables


def check_dtype(variable: Any) -> None:
    dtype = dtype_name(variable)
    if dtype not in ("float32", "float64", *MANTISSA_BITS):
        raise ValueError(
            "Only variables of dtype float32, bfloat16, float16 and float64 can "
            f"be trained. Received: {path_of(variable)} of dtype {dtype}. Pass "
            "`model.trainable_variables`, or make it non-trainable."
        )


def checked_gradients(grads: Any) -> list[Any]:
    """A list of gradients: arrays or tensors, dense or `tf.IndexedSlices` of tensors."""
    if not isinstance(grads, Iterable) or hasattr(grads, "shape"):
        raise ValueError(
            "`grads` must be a list of gradients, each a tensor, `tf.IndexedSlices` "
            f"or None. Received: {_shown(grads)}"
        )
    checked = []
    for g in grads:
        if g is not None:
            g = with_tensors(g)
        if g is not None and not _is_real(g):
            raise ValueError(
                "A gradient must be a tensor of real numbers, `tf.IndexedSlices` or "
                f"None. Received: {_shown(g)}"
            )
        checked.append(g)
    return checked


def is_nothing(grads: Any, variables: Any) -> bool:
    """Whether there are neither gradients nor variables: nothing is to be done."""
    lists = [grads, [] if variables is None else variables]
    return all(isinstance(x, list | tuple) and len(x) == 0 for x in lists)


def _is_real(gradient: Any) -> bool:
    dtype = str(getattr(gradient.dtype, "name", gradient.dtype))
    return "float" in dtype or "int" in dtype


def same_shape(gradient: Any, own: tuple[int, ...]) -> bool:
    """Whether a gradient has a variable's shape, as far as is known in a graph."""
    mine = known_shape(gradient)
    if not is_sparse(gradient):
        return _agree(mine, own)
    rows = known_shape(gradient.values)
    rows_fit = rows is None or _agree((None, *rows[1:]), own)
    return rows_fit and _agree(mine, own)


def known_shape(thing: Any) -> tuple[int | None, ...] | None:
    """A static shape: None for an axis, or all of it, that isn't known."""
    shape = thing.shape
    is_unknown = shape is None or getattr(shape, "rank", 0) is None
    return None if is_unknown else tuple(shape)


def _agree(one: tuple | None, other: tuple | None) -> bool:
    if one is None or other is None:
        return True
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a == b or None in (a, b) for a, b in pairs)


def shown_shape(gradient: Any) -> str:
    """The shape of a gradient in an error's text."""
    shape = known_shape(gradient)
    if not is_sparse(gradient):
        return f"shape {shape}"
    return f"shape {shape}, with rows of shape {known_shape(gradient.values)[1:]}"


def with_a_gradient(grads: list[Any], variables: list[Any]) -> list[int]:
    """The places of those with a gradient; of others, Keras's warning."""
    missing = [path_of(v) for g, v in zip(grads, variables, strict=True) if g is None]
    if variables and len(missing) == len(variables):
        raise ValueError(
            "No gradients provided for any variable. Check that the loss depends "
            f"on them. Received: None for {missing[:5]}"
            + (" and more." if len(missing) > 5 else ".")
        )
    if missing:
        warnings.warn(
            f"Gradients do not exist for variables {missing} when minimizing the "
            "loss. If using `model.compile()`, did you forget to provide a `loss` "
            "argument?",
            stacklevel=4,
        )
    return [k for k, g in enumerate(grads) if g is not None]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({type(value).__name__})"


def check_lazy(optimizer: Any) -> None:
    """Raises `ValueError` if `lazy=True` can't be combined with other settings."""
    if not optimizer.lazy:
        return
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "`lazy=True` needs Keras's TensorFlow backend: on "
            f"{keras.backend.backend()!r} an embedding's gradient is dense. "
            "Received: lazy=True"
        )
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "`lazy=True` can't be combined with `gradient_accumulation_steps`: "
            "the sum of several gradients has more rows than the last one. "
            "Received: gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}"
        )
    if not optimizer.elementwise:
        raise ValueError(
            f"`lazy=True` can't be combined with {type(optimizer).__name__}: its step "
            "for a row depends on the other rows. Received: lazy=True"
        )
    if optimizer.transforms:
        raise ValueError(
            "`lazy=True` can't be combined with `transforms`: they see whole "
            f"tensors. Received: transforms={list(optimizer.transforms)}"
        )
    on_rows = [x for x in optimizer.averaging if x.where == "write"]
    if not all(x.elementwise for x in on_rows):
        raise ValueError(
            "`lazy=True` can't be combined with stages on the written weight that "
            "aren't `elementwise`: they see whole tensors. Received: "
            f"averaging={list(optimizer.averaging)}"
        )
