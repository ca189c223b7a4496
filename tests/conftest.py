"""Which cases are slow; which process runs which file, and when a fresh one takes over."""

from __future__ import annotations

import fnmatch
import resource
import sys
from typing import Any

import pytest

# The longest first, so that no process waits at the end.
LONGEST = ("test_ways", "test_precision", "test_mirrored", "test_transforms")
# Files whose tests fill more than one process: those of each optimizer go together.
DIVIDED = ("test_adversarial",)
GIGABYTES_OF_A_PROCESS = 4


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("representatives")
        if marker and not _is_among(item, marker.args):
            item.add_marker(pytest.mark.slow)

    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)  # which keeps the order within a file


@pytest.hookimpl(tryfirst=True)  # before the fixtures of its module
def pytest_runtest_setup(item: pytest.Item) -> None:
    _forget_programs(item)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _forget_programs(item)


def _forget_programs(item: pytest.Item) -> None:
    if item.get_closest_marker("fresh_programs"):
        from tf_effopt.runtime import programs

        programs._shared.clear()


def _is_among(item: pytest.Item, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(item.callspec.id, p) for p in patterns)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    report = yield
    unit = 1 if sys.platform == "darwin" else 1024
    report.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class FreshProcesses(LoadFileScheduling):
        """Files to processes; one that has grown large gets its last file.

        XLA's programs stay in their process: gigabytes, and 3 memory mappings for
        each function, of which Linux allows 65,530.
        """

        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.bytes: dict[Any, int] = {}

        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if file.endswith(tuple(f"{name}.py" for name in DIVIDED)):
                return nodeid.split("-")[0]  # up to the first of its parameters
            return file

        def _reschedule(self, node: Any) -> None:
            if node not in self.registered_collections:  # It's still starting.
                return
            super()._reschedule(node)
            # A process begins a test once it knows which one comes after it.
            assigned = self.assigned_work[node]
            while (
                self.workqueue
                and not node.shutting_down
                and self._pending_of(assigned) < 2
            ):
                self._assign_work_unit(node)

        def _assign_work_unit(self, node: Any) -> None:
            super()._assign_work_unit(node)
            is_large = self.bytes.get(node, 0) > GIGABYTES_OF_A_PROCESS * 1e9
            if is_large and self.workqueue:
                node.shutdown()  # after what it was given

    if config.getoption("dist") != "loadfile":
        return None
    scheduler = FreshProcesses(config, log)
    config.pluginmanager.register(Successors(config, scheduler))
    return scheduler


class Successors:
    """A new process in the place of each that ended before the files did."""

    def __init__(self, config: pytest.Config, scheduler: Any):
        self.session = config.pluginmanager.getplugin("dsession")
        self.scheduler = scheduler

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.scheduler.bytes[report.node] = report.bytes

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        node.gateway.exit()  # else the process waits, with its memory, for the end
        is_early = self.scheduler.workqueue and not self.session.shuttingdown
        if error is None and is_early:
            self.session._clone_node(node)
