"""The order of the test files: the longest first, so that no process waits at the end."""

from __future__ import annotations

import pytest

LONGEST = ("test_ways", "test_precision", "test_mirrored", "test_transforms")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)  # which keeps the order within a file
