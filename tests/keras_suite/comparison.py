"""What is expected to fail of Keras's tests, and whether what failed is that."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")
AT_MOST = 40


@dataclass(frozen=True)
class Difference:
    """A test function of Keras that ours don't pass, on purpose.

    Attributes:
        test: file, class and function below `keras/src`; a `*` stands for the
            cases of one parametrized function.
        reason: what ours do, and why.
        ours: the test of this project that holds it, as file and function.
        backends: where it fails.
    """

    test: str
    reason: str
    ours: str
    backends: tuple[str, ...] = BACKENDS

    def covers(self, test: str) -> bool:
        return fnmatch.fnmatchcase(test, self.test)


@dataclass
class Verdict:
    """The comparison of one run; empty lists are what one wants."""

    unexpected: list[str] = field(default_factory=list)
    no_longer: list[str] = field(default_factory=list)
    keras_fails: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not (self.unexpected or self.no_longer)


def differences() -> list[Difference]:
    """The list, from `differences.toml`."""
    entries = tomllib.loads((HERE / "differences.toml").read_text())["difference"]
    found = []
    for entry in entries:
        entry["backends"] = tuple(entry.get("backends", BACKENDS))
        found.append(Difference(**entry))
    return found


def compare(
    backend: str,
    failed: Iterable[str],
    failed_with_keras: Iterable[str],
    ran: Iterable[str],
    listed: list[Difference],
) -> Verdict:
    """Says which failures are ours and not listed, and what is listed in vain.

    Args:
        backend: where it ran.
        failed: tests that fail with our classes.
        failed_with_keras: those of them that fail with Keras's classes, too.
        ran: all tests that ran; an entry whose test isn't among them is left alone.
        listed: the list.
    """
    here = [entry for entry in listed if backend in entry.backends]
    keras_fails = sorted(set(failed) & set(failed_with_keras))
    failed = sorted(set(failed) - set(failed_with_keras))
    unexpected = [t for t in failed if not any(e.covers(t) for e in here)]
    no_longer = [
        entry.test
        for entry in here
        if any(entry.covers(t) for t in ran) and not any(map(entry.covers, failed))
    ]
    return Verdict(unexpected, no_longer, keras_fails)


def as_markdown(listed: list[Difference]) -> str:
    """The page of the docs."""
    rows = []
    for entry in listed:
        test = entry.test.replace("::", "<br>", 1).replace("*", r"\*")
        where = "all" if entry.backends == BACKENDS else ", ".join(entry.backends)
        rows.append(f"| {test} | {where} | {entry.reason} | `{entry.ours}` |")
    text = (HERE / "page.md").read_text()
    return text.replace("COUNT", str(len(listed))).replace("ROWS", "\n".join(rows))
