"""Hints at the names that were meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

# What other libraries, and Keras 2, call an argument; the first that a class has is
# meant.
ALIASES = {
    "b1": ("beta_1",),
    "b2": ("beta_2",),
    "beta1": ("beta_1",),
    "beta2": ("beta_2",),
    "decay_rate": ("weight_decay",),
    "eps": ("epsilon",),
    "lr": ("learning_rate",),
    "lr_mult": ("learning_rate_multiplier",),
    "lr_multiplier": ("learning_rate_multiplier",),
    "lr_scale": ("learning_rate_multiplier",),
    "max_grad_norm": ("global_clipnorm",),
    "max_norm": ("global_clipnorm",),
    "mu": ("momentum",),
    "multiplier": ("learning_rate_multiplier",),
    "rate": ("learning_rate",),
    "wd": ("weight_decay",),
}
# Those for which one name isn't the answer.
ALIASES_OF_SEVERAL = {
    "betas": (
        ("beta_1", "beta_2"),
        "Pass PyTorch's `betas=(0.9, 0.999)` as `beta_1=0.9, beta_2=0.999`.",
    ),
    "decay": (
        ("learning_rate", "weight_decay"),
        (
            "In Keras 2 `decay` lowered the learning rate: pass "
            "`learning_rate=keras.optimizers.schedules.InverseTimeDecay(...)`. For the "
            "decay of weights, set `weight_decay`."
        ),
    ),
}
SHORT = 4  # letters: in names as short as these one letter is a large part


def did_you_mean(name: str, known: Iterable[str], quote: str = "") -> str:
    """A hint at the likest name, with a space in front; empty if none is like it."""
    known = list(known)
    several, advice = ALIASES_OF_SEVERAL.get(name.lower(), ((), ""))
    if several and set(several) <= set(known):
        return f" {advice}"
    several = [x for x in several if x in known]
    if several:
        return f" Did you mean {quote}{several[0]}{quote}?"
    alias = next((x for x in ALIASES.get(name.lower(), ()) if x in known), None)
    if alias is not None:
        return f" Did you mean {quote}{alias}{quote}?"
    # By its initials, too: `lr` is the learning rate.
    lower = {"".join(part[:1] for part in k.lower().split("_")): k for k in known}
    lower |= {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" Did you mean {quote}{lower[near[0]]}{quote}?" if near else ""


def advice(name: str, known: Mapping[str, str]) -> str | None:
    """What may be meant by a name that isn't known, as an advice; None: nothing."""
    several, advice = ALIASES_OF_SEVERAL.get(name.lower(), ((), ""))
    if several and all(x in known for x in several):
        return advice
    aliases = (*several, *ALIASES.get(name.lower(), ()))
    near = next((x for x in aliases if x in known), None)
    near = near or next(_within_two_letters(name.lower(), known), None)
    return None if near is None else f"Set `{known[near]}` instead."


def _within_two_letters(name: str, known: Iterable[str]) -> Iterator[str]:
    """The known names at an edit distance of at most 2, the nearest first."""
    distances = sorted((distance(name, x.lower(), limit=2), x) for x in known)
    for apart, x in distances:
        if apart <= (1 if len(x) <= SHORT else 2):
            yield x


def distance(one: str, other: str, limit: int) -> int:
    """Levenshtein's edit distance; `limit + 1` for what is farther apart.

    >>> distance("momentun", "momentum", limit=2), distance("lr", "rate", limit=2)
    (1, 3)
    """
    if abs(len(one) - len(other)) > limit:
        return limit + 1
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return min(row[-1], limit + 1)
