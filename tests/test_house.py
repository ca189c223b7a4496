"""The house stays in order: sizes of files, what they are made of, the way of an update."""

from __future__ import annotations

import house


def test_little_is_repeated_in_optimizers():
    repeated = house.repeated_lines()
    assert repeated.share < 0.02, repeated.lines


def test_optimizers_are_rules_docstrings_and_arguments():
    assert house.share_of_content(house.optimizer_files()) > 0.85


def test_files_and_classes_are_short():
    assert not house.long_files(400)
    assert not house.long_classes(300)


def test_an_update_enters_few_files():
    entered = house.files_entered()
    assert "runtime/programs.py" in entered
    assert len(entered) <= 12, entered


def test_an_optimizer_with_more_lines_of_other_kinds_is_seen(tmp_path):
    path = tmp_path / "one.py"
    path.write_text('"""One."""\nimport os\n\n\ndef rule(g):\n    return g\n')
    assert house.kinds_of_lines(path) == {"docs": 1, "imports": 1, "rule": 2}
    assert house.share_of_content([path]) == 0.75
