"""What one update costs beside another version of tf_effopt, in its own process.

The part of `update_cost.py` that `--against CHECKOUT` runs. Both versions run in
processes with the worker of *this* checkout, so that both are measured alike.

Processes of one program differ from each other, by where their memory lies: so each
case gets `PROCESSES` pairs of them, and the pairs of blocks are shared out to these.
Each pair gives one ratio of first calls, whose interval is found alike. A block is the median of some samples in a row, after one that isn't counted, for the
caches that the other process left. Blocks alternate, A-B-A-B; each pair of
neighbours gives one ratio, in which a busy minute of the machine is above and below
the line.

Of these n ratios the median is printed, and an interval: the narrowest pair of order
statistics, as far from either end, that holds the true median with a probability of at
least 95 % (the sign test's). It supposes nothing of how times are distributed, and
needs no random numbers; with n = 15 it goes from the 4th to the 12th. Fewer than 6
ratios can't give 95 %: then it is their whole range, and its probability is printed.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import subprocess
from typing import Any

from competitors import Case, Competitor
from worker import Worker, calls_of_a_sample
from workloads import Workload

HERE = pathlib.Path(__file__).resolve().parents[2]
PROCESSES = 5  # pairs of them, for each case
SAMPLES_OF_A_BLOCK = 5
LIMIT = 1.03  # A change for the worse is one whose interval is above it.
COVERAGE = 0.95
SIDES = ("this", "other")


def problem_of(checkout: pathlib.Path) -> str | None:
    """What is wrong with the folder of a checkout, if anything is."""
    if (checkout / "tf_effopt" / "__init__.py").is_file():
        return None
    return (
        f"--against takes the folder of another checkout, one that holds "
        f"tf_effopt/__init__.py. Received: --against {checkout}. To make one: "
        "git worktree add ../other COMMIT"
    )


def commit_of(checkout: pathlib.Path) -> str | None:
    """The commit, with a `+` where files were changed; None without git."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+"]
    try:
        finished = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()


def check_start(answer: dict[str, Any], checkout: pathlib.Path) -> None:
    """Ends the run if a process didn't start, or runs another version.

    Raises:
        SystemExit: it says what was imported from where.
    """
    if "error" in answer:
        raise SystemExit(f"tf_effopt of {checkout} doesn't start: {answer['error']}")
    file = pathlib.Path(answer["tf_effopt_file"]).resolve()
    if not file.is_relative_to(checkout.resolve()):
        raise SystemExit(
            f"The process of {checkout} imported tf_effopt from {file}: this would "
            "compare a version with itself. Uninstall tf_effopt, or run from an "
            "environment where nothing imports it at the start."
        )


# --------------------------------------------------------------------- measuring


def compare_workload(
    workload: Workload,
    chosen: list[tuple[Case, list[Competitor]]],
    checkout: pathlib.Path,
    repeats: int,
    software: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measures some cases of a workload in both versions.

    Args:
        chosen: each case with the ways to run it.
        checkout: folder of the other version.
        repeats: pairs of blocks, of each case.
        software: gets the versions that ran.
    """
    results = {
        (case.name, competitor.name): _result(workload, case, competitor)
        for case, competitors in chosen
        for competitor in competitors
    }
    shares = [len(range(k, repeats, PROCESSES)) for k in range(PROCESSES)]
    for number, share in enumerate(filter(None, shares)):
        # The other version starts, and prepares, first in every second pair.
        sides = SIDES if number % 2 == 0 else SIDES[::-1]
        folders = {"this": HERE, "other": checkout}
        workers = {
            side: Worker("tensorflow", workload, folders[side]) for side in sides
        }
        try:
            for side, worker in workers.items():
                answer = worker.ask("start")
                check_start(answer, folders[side])
                software[side] = answer | {"commit": commit_of(folders[side])}
            for case, competitors in chosen:
                for competitor in competitors:
                    result = results[case.name, competitor.name]
                    if "error" not in result:
                        _compare(result, case, competitor.name, workers, share)
                for worker in workers.values():
                    worker.ask("drop_all")
        finally:
            for worker in workers.values():
                worker.stop()
    for result in results.values():
        summarize(result)
    return list(results.values())


def _result(workload: Workload, case: Case, competitor: Competitor) -> dict[str, Any]:
    return {
        "workload": workload.name,
        "optimizer": case.name,
        "title": case.title,
        "arguments": case.arguments,
        "way": competitor.name.removeprefix("tf_effopt "),
        "tensors": len(workload.shapes),
        "parameters": workload.parameters,
        **{side: {"blocks": [], "first_call_seconds": []} for side in SIDES},
    }


def _compare(
    result: dict[str, Any],
    case: Case,
    name: str,
    workers: dict[str, Worker],
    blocks: int,
) -> None:
    """Adds first calls and blocks of one pair of processes to `result`."""
    calls = {}
    for side, worker in workers.items():
        answer = worker.ask("prepare", name, case)
        if "error" in answer:
            result["error"] = f"{_SAID[side]}: {answer['error']}"
            return
        result[side]["first_call_seconds"].append(answer["first_call_seconds"])
        result[side]["state_bytes"] = answer["state_bytes"]
        sample = worker.ask("time_calls", name, case.calls)  # which isn't counted
        calls[side] = None if isinstance(sample, dict) else sample
    if None in calls.values():
        result["error"] = "a call failed"
        return
    # As many in both: what a sample costs beside its calls is in both, too.
    count = calls_of_a_sample(case, min(calls.values()))
    for _ in range(blocks):
        for side in SIDES:
            samples = [
                workers[side].ask("time_calls", name, count)
                for _ in range(1 + SAMPLES_OF_A_BLOCK)
            ]
            if any(isinstance(sample, dict) for sample in samples):
                result["error"] = f"{_SAID[side]}: a call failed"
                return
            result[side]["blocks"].append(samples[1:])


_SAID = {"this": "this version", "other": "the other version"}


# ----------------------------------------------------------------------- numbers


def summarize(result: dict[str, Any]) -> None:
    """Adds the medians, and both ratios: this version's time by the other's."""
    if "error" in result:
        return
    medians = {
        side: [statistics.median(block) for block in result[side]["blocks"]]
        for side in SIDES
    }
    for side in SIDES:
        result[side]["median"] = statistics.median(medians[side])
    result["ratio"] = interval(
        [a / b for a, b in zip(medians["this"], medians["other"], strict=True)]
    )
    first = [result[side]["first_call_seconds"] for side in SIDES]
    result["first_call_ratio"] = interval([a / b for a, b in zip(*first, strict=True)])
    result["passed"] = result["ratio"]["low"] < LIMIT


def interval(ratios: list[float]) -> dict[str, float]:
    """The median of some ratios, and between which two of them it is.

    Returns:
        `median`, `low`, `high`, and `coverage`: the probability with which the
        interval holds the median of what they are a sample of.
    """
    n, ordered = len(ratios), sorted(ratios)

    def coverage(k: int) -> float:
        """From the k-th to the k-th from the end, counted from 0."""
        return 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    inner = [k for k in range((n + 1) // 2) if coverage(k) >= COVERAGE]
    k = max(inner, default=0)
    return {
        "median": statistics.median(ratios),
        "low": ordered[k],
        "high": ordered[n - 1 - k],
        "coverage": coverage(k),
    }


def write(results: dict[str, Any], text: str, directory: pathlib.Path) -> None:
    (directory / "against.json").write_text(json.dumps(results, indent=1) + "\n")
    (directory / "against.md").write_text(text)
