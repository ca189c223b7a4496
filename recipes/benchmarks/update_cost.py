"""What one update costs: time, first call, memory, against other libraries.

    python recipes/benchmarks/update_cost.py
    python recipes/benchmarks/update_cost.py --workload resnet50 --optimizer adam
    python recipes/benchmarks/update_cost.py --quick
    python recipes/benchmarks/update_cost.py --against ../other --workload resnet50

Every public optimizer of tf_effopt, and some of its options, in a graph and
eagerly, against `keras.optimizers` (graph, XLA, eager), `optax` under `jax.jit`
with donated buffers, and `torch.optim` with `fused=True`. Install them with
`pip install .[cpu,benchmarks]`; what is missing is left out.

Each framework runs in a separate process with its default threads. All libraries
take turns, A-B-C-B-C-A, so that a busy moment of the machine hits all alike. A
sample is one update, or the mean of as many as take 20 ms; with gradient
accumulation, and of SOAP with its work on the bases, it is the mean over full
cycles of calls. The first call makes the state, traces, compiles and runs.

Writes `update_cost.json` (every sample), `update_cost.md` and
`update_cost.png` to `--output-dir`. All workloads together need 20 GB of
memory, `--workload resnet50` 4 GB.

`--against CHECKOUT` compares this checkout with another one instead, such as a
`git worktree` of the last release. Both are in separate processes, which run this
checkout's benchmark; `--repeats` pairs of blocks, A-B-A-B, in up to 5 pairs of
processes, give as many ratios, this version's time by the other's. It prints their
median and a 95 % interval, the same for first calls, and writes `against.json` and
`against.md` to `--output-dir`. An interval whose lower end is under 1.03 shows no loss
of speed. `against.py` tells how the interval is found. What the other version hasn't
got is named and left out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import against
import numpy as np
import report
from competitors import COMPETITORS, OURS, Case, Competitor
from worker import Worker, calls_of_a_sample
from workloads import Workload, all_workloads

# name: (title, class, arguments)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "momentum": ("SGD, momentum", "SGD", {"momentum": 0.9}),
    "adam_clip": ("Adam, global_clipnorm", "Adam", {"global_clipnorm": 1.0}),
    "adam_ema": ("Adam, use_ema", "Adam", {"use_ema": True}),
    "adam_accumulation": (
        "Adam, accumulation of 4",
        "Adam",
        {"gradient_accumulation_steps": 4},
    ),
    "adam_lazy": ("Adam, lazy", "Adam", {"lazy": True}),
    "soap_768": ("SOAP, axes up to 768", "SOAP", {"max_precondition_dim": 768}),
}
MIRRORED = (OURS, "Keras graph")
LARGE = 50_000_000  # parameters, above which options aren't measured eagerly
CASES_OF_A_PROCESS = 4  # compiled programs stay in memory, a GB for each case
# Of axes' lengths: above this SOAP's first update takes more than some minutes.
MOST_CUBES = 5e9


# ------------------------------------------------------------------- what is run


def all_cases() -> dict[str, Case]:
    """Name -> case: the public optimizers with their defaults, and variants."""
    import tf_effopt

    rules = tf_effopt.optimizers.__all__
    settings = {name.lower(): (name, name, {}) for name in rules} | VARIANTS
    cases = [
        Case(name, title, rule, arguments, make(**arguments).get_config())
        for name, (title, rule, arguments) in settings.items()
        for make in [getattr(tf_effopt, rule)]
    ]
    # A variant comes after the optimizer it is one of.
    cases.sort(key=lambda case: rules.index(case.rule))
    return {case.name: case for case in cases}


def cases_of(workload: Workload, cases: dict[str, Case]) -> list[Case]:
    """Sparse gradients are measured for Adam, dense and lazy; the rest is dense."""
    if workload.rows is not None:
        return [case for name, case in cases.items() if name in ("adam", "adam_lazy")]
    return [
        case
        for case in cases.values()
        if not case.config["lazy"] and (case.rule != "SOAP" or suits(workload, case))
    ]


def suits(workload: Workload, case: Case) -> bool:
    """Whether SOAP's first update ends in time, and a variant is one here."""
    limit = case.config["max_precondition_dim"]
    axes = [n for shape in workload.shapes if len(shape) > 1 for n in shape]
    cubes = sum(n**3 for n in axes if n <= limit)
    return 0 < cubes <= MOST_CUBES and (case.name == "soap" or max(axes) > limit)


def competitors_of(workload: Workload) -> list[Competitor]:
    if workload.replicas > 1:
        return [c for c in COMPETITORS if c.name in MIRRORED]
    return list(COMPETITORS)


def is_too_large(workload: Workload, case: Case, competitor: Competitor) -> bool:
    """All competitors' state is in memory at once, and options add to it."""
    return (
        workload.parameters > LARGE
        and case.name in VARIANTS
        and competitor.name.endswith("eager")
    )


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --------------------------------------------------------------------- measuring


class CopyBandwidth:
    """What the machine's memory gives: a copy of large arrays on all cores."""

    def __init__(self, megabytes: int):
        self.source = np.ones(megabytes << 18, "float32")
        self.target = np.zeros_like(self.source)
        self.threads = ThreadPoolExecutor(core_count())

    def gigabytes_per_second(self) -> float:
        """Bytes read and bytes written, per second."""
        parts = core_count()
        sources = np.array_split(self.source, parts)
        targets = np.array_split(self.target, parts)
        start = time.perf_counter()
        list(self.threads.map(np.copyto, targets, sources))
        return 2 * self.source.nbytes / (time.perf_counter() - start) / 1e9


def measure_workload(
    workload: Workload,
    cases: list[Case],
    repeats: int,
    copy: CopyBandwidth,
    software: dict[str, Any],
) -> list[dict[str, Any]]:
    """Runs all cases of a workload; adds versions to `software`."""
    competitors = competitors_of(workload)
    missing = {c.name for c in competitors if not all(map(is_installed, c.packages))}
    frameworks = {c.framework for c in competitors if c.name not in missing}
    results = []
    for start in range(0, len(cases), CASES_OF_A_PROCESS):
        workers = {name: Worker(name, workload) for name in sorted(frameworks)}
        try:
            for name, worker in workers.items():
                software[name] = worker.ask("start")
            for case in cases[start : start + CASES_OF_A_PROCESS]:
                result = measure_case(
                    workload, case, competitors, missing, workers, repeats, copy
                )
                results.append(result)
                print(report.progress_line(result), flush=True)
        finally:
            for worker in workers.values():
                worker.stop()
    return results


def measure_case(
    workload: Workload,
    case: Case,
    competitors: list[Competitor],
    missing: set[str],
    workers: dict[str, Worker],
    repeats: int,
    copy: CopyBandwidth,
) -> dict[str, Any]:
    measured: dict[str, dict[str, Any]] = {}
    for competitor in competitors:
        if competitor.name in missing:
            measured[competitor.name] = {"error": "not installed"}
            continue
        if is_too_large(workload, case, competitor):
            measured[competitor.name] = {"error": "not measured"}
            continue
        worker = workers[competitor.framework]
        measured[competitor.name] = worker.ask("prepare", competitor.name, case)

    bandwidths = []
    for turn in range(1 + repeats):
        bandwidths.append(copy.gigabytes_per_second())
        # Another one comes first each time: caches are not as the last one left them.
        first = turn % len(competitors)
        for competitor in competitors[first:] + competitors[:first]:
            entry = measured[competitor.name]
            if "error" not in entry:
                worker = workers[competitor.framework]
                take_sample(worker, competitor.name, case, entry, warm_up=turn == 0)
    for worker in workers.values():
        worker.ask("drop_all")

    result = {
        "workload": workload.name,
        "optimizer": case.name,
        "title": case.title,
        "arguments": case.arguments,
        "tensors": len(workload.shapes),
        "parameters": workload.parameters,
        "replicas": workload.replicas,
        "copy_gigabytes_per_second": bandwidths,
        "competitors": measured,
    }
    summarize(result, workload, case)
    return result


def take_sample(
    worker: Worker, name: str, case: Case, entry: dict[str, Any], warm_up: bool
) -> None:
    """Adds a sample to `entry`; the warm-up tells how many calls to time."""
    calls = case.calls if warm_up else entry["calls_per_sample"]
    sample = worker.ask("time_calls", name, calls)
    if isinstance(sample, dict):
        entry |= sample
    elif warm_up:
        calls = calls_of_a_sample(case, sample)
        entry |= {"calls_per_sample": calls, "milliseconds": []}
    else:
        entry["milliseconds"].append(sample)


def summarize(result: dict[str, Any], workload: Workload, case: Case) -> None:
    """Adds medians, bytes per parameter and the share of the bandwidth."""
    measured = {k: v for k, v in result["competitors"].items() if "error" not in v}
    for entry in measured.values():
        state = entry.pop("state_bytes") / workload.parameters
        entry["state_bytes_per_parameter"] = state
        entry["median"] = statistics.median(entry["milliseconds"])

    dense_on_one_device = workload.rows is None and workload.replicas == 1
    if OURS in measured and dense_on_one_device:
        state = measured[OURS]["state_bytes_per_parameter"]
        result["array_passes"] = fewest_passes(state, case)
        moved = result["array_passes"] * 4 * workload.parameters
        # The machine's, not that of a moment when something else ran.
        bandwidth = max(result["copy_gigabytes_per_second"])
        result["milliseconds_at_copy_bandwidth"] = bound = moved / bandwidth / 1e6
        for entry in measured.values():
            entry["bandwidth_share"] = bound / entry["median"]


def fewest_passes(state_bytes_per_parameter: float, case: Case) -> float:
    """Reads and writes of whole arrays without which a call can't do.

    An update reads the gradient, and reads and writes the weight and each array
    of state: 7 passes for Adam. A global norm reads the gradient once more. With
    accumulation, a micro-step without an update reads the gradient, and reads
    and writes the accumulator.
    """
    update = 1 + 2 * (1 + state_bytes_per_parameter / 4)
    if case.config["global_clipnorm"]:
        update += 1
    return (update + 3 * (case.micro_steps - 1)) / case.micro_steps


# ------------------------------------------------------------------- the machine


def core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": core_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


# -------------------------------------------------------------- the command line


def parse_arguments(argv: list[str] | None, names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    workloads = list(all_workloads())
    parser.add_argument(
        "--workload", nargs="+", choices=workloads, default=workloads, metavar="NAME",
        help=f"any of {', '.join(workloads)}",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"any of {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=15, help="samples of each")
    parser.add_argument(
        "--against", type=pathlib.Path, metavar="CHECKOUT",
        help="folder of another version of tf_effopt, to compare this one with",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir",
        type=pathlib.Path,
        default=pathlib.Path("recipes/benchmarks/results"),
        help="where the JSON, the table and the picture go",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few tiny tensors, 3 samples: whether it runs, not how fast",
    )
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(
            f"--repeats must be at least 1. Received: --repeats {arguments.repeats}"
        )
    if arguments.against and (problem := against.problem_of(arguments.against)):
        parser.error(problem)
    if arguments.quick:
        arguments.repeats = min(arguments.repeats, 3)
    try:  # Now, not after an hour of measuring.
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir {arguments.output_dir} can't be made: {error}")
    return arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes to the JSON file."""
    cases = all_cases()
    arguments = parse_arguments(argv, list(cases))
    chosen = {name: case for name, case in cases.items() if name in arguments.optimizer}
    words = sys.argv[1:] if argv is None else argv
    results: dict[str, Any] = {
        "command": " ".join(["python recipes/benchmarks/update_cost.py", *words]),
        "date": datetime.date.today().isoformat(),
        "quick": arguments.quick,
        "repeats": arguments.repeats,
        "machine": describe_machine(),
        "software": {},
        "load_average_before": load_average(),
        "results": [],
    }
    start = time.monotonic()
    if arguments.against:
        return compare(results, arguments, chosen, start)
    copy = CopyBandwidth(megabytes=4 if arguments.quick else 256)
    for name, workload in all_workloads().items():
        if name not in arguments.workload:
            continue
        if arguments.quick:
            workload = workload.tiny()
        results["results"] += measure_workload(
            workload,
            cases_of(workload, chosen),
            arguments.repeats,
            copy,
            results["software"],
        )
        results["seconds"] = time.monotonic() - start
        results["load_average_after"] = load_average()
        write(results, arguments.output_dir)
    print(f"Wrote {arguments.output_dir}/update_cost.json, .md and .png")
    return results


def compare(
    results: dict[str, Any],
    arguments: argparse.Namespace,
    chosen: dict[str, Case],
    start: float,
) -> dict[str, Any]:
    """Runs `--against`; returns what it writes to the JSON file."""
    titles = {name: w.title for name, w in all_workloads().items()}
    results["other"] = str(arguments.against)
    for name, workload in all_workloads().items():
        if name not in arguments.workload:
            continue
        if arguments.quick:
            workload = workload.tiny()
        with_ways = [
            (case, our_ways(workload, case)) for case in cases_of(workload, chosen)
        ]
        for first in range(0, len(with_ways), CASES_OF_A_PROCESS):
            compared = against.compare_workload(
                workload,
                with_ways[first : first + CASES_OF_A_PROCESS],
                arguments.against.resolve(),
                arguments.repeats,
                results["software"],
            )
            results["results"] += compared
            print(*map(report.comparison_line, compared), sep="\n", flush=True)
            results["seconds"] = time.monotonic() - start
            results["load_average_after"] = load_average()
            text = report.comparison(results, titles)
            against.write(results, text, arguments.output_dir)
    print(f"Wrote {arguments.output_dir}/against.json and .md")
    return results


def our_ways(workload: Workload, case: Case) -> list[Competitor]:
    return [
        competitor
        for competitor in competitors_of(workload)
        if competitor.name.startswith("tf_effopt")
        and not is_too_large(workload, case, competitor)
    ]


def write(results: dict[str, Any], directory: pathlib.Path) -> None:
    titles = {name: w.title for name, w in all_workloads().items()}
    results["goals"] = report.check_goals(results["results"])
    (directory / "update_cost.json").write_text(json.dumps(results, indent=1) + "\n")
    (directory / "update_cost.md").write_text(report.markdown(results, titles))
    report.draw(results, titles, directory / "update_cost.png")


if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = "tensorflow"
    sys.path.insert(0, str(against.HERE))  # This checkout is measured.
    main()
