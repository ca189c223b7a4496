"""The report of `update_cost.py`: goals, a table in Markdown, a picture."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from typing import Any

from against import COVERAGE, LIMIT
from competitors import COMPETITORS, OURS

# ------------------------------------------------------------------------- goals


@dataclasses.dataclass(frozen=True)
class Goal:
    """`slower` takes at least `factor` times as long as `faster`."""

    optimizer: str
    factor: float
    slower: str
    faster: str = OURS
    workload: str = "resnet50"

    @property
    def text(self) -> str:
        if self.factor < 1:
            return f"at most {1 / self.factor:.1f} times the time of {self.slower}"
        if self.factor == 1:
            return f"no slower than {self.slower}"
        return f"at least {self.factor:g} times as fast as {self.slower}"


GOALS = (
    *(
        Goal(optimizer, 1.8, "Keras graph")
        for optimizer in (
            "sgd",
            "momentum",
            "rmsprop",
            "adamw",
            "adam_clip",
            "adam_ema",
            "adam_accumulation",
        )
    ),
    Goal("adam", 2.3, "Keras graph"),
    Goal("adam", 15, "Keras eager", faster="tf_effopt eager"),
    Goal("adam", 1, "Keras XLA"),
    Goal("adam", 1 / 1.1, "optax jit"),
    Goal("adam", 1, "torch fused"),
    Goal("muon", 2, "Keras graph", workload="matrices"),
    Goal("adam_lazy", 100, "Keras graph", workload="embedding"),
)
FIRST_CALL_SECONDS = 6.0


def check_goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what was measured, and whether that passes."""
    entries = {(r["workload"], r["optimizer"]): r["competitors"] for r in results}
    checked = []
    for goal in GOALS:
        measured = entries.get((goal.workload, goal.optimizer), {})
        slower = measured.get(goal.slower, {}).get("median")
        faster = measured.get(goal.faster, {}).get("median")
        ratio = slower / faster if slower and faster else None
        checked.append(
            {
                "workload": goal.workload,
                "optimizer": goal.optimizer,
                "goal": f"{goal.faster} {goal.text}",
                "measured": None if ratio is None else f"{ratio:.2f} times as fast",
                "passed": None if ratio is None else ratio >= goal.factor,
            }
        )
    adam = entries.get(("resnet50", "adam"), {}).get(OURS, {})
    seconds = adam.get("first_call_seconds")
    checked.append(
        {
            "workload": "resnet50",
            "optimizer": "adam",
            "goal": f"{OURS}: first call within {FIRST_CALL_SECONDS:g} s",
            "measured": None if seconds is None else f"{seconds:.1f} s",
            "passed": None if seconds is None else seconds <= FIRST_CALL_SECONDS,
        }
    )
    return checked


# ---------------------------------------------------------------------- Markdown


def markdown(results: dict[str, Any], titles: dict[str, str]) -> str:
    lines = ["# The cost of one update", "", *_header(results), ""]
    lines += ["## Goals", "", *_goals_table(results["goals"]), ""]
    for workload, group in _by_workload(results["results"]).items():
        first = group[0]
        size = f"{first['tensors']} tensors, {first['parameters'] / 1e6:.1f} M"
        lines += [f"## {titles[workload]} ({size})", "", *_times_table(group), ""]
        lines += [*_memory_table(group), ""]
    return "\n".join(lines)


def _header(results: dict[str, Any]) -> list[str]:
    machine, software = results["machine"], results["software"]
    versions = {
        name: version
        for framework in software.values()
        for name, version in framework.get("versions", {}).items()
        if name != "torch build"
    }
    threads = ", ".join(f"{k} {v.get('threads')}" for k, v in software.items())
    loads = [results["load_average_before"], results["load_average_after"]]
    load = " to ".join(f"{x[0]:.1f}" for x in loads if x)
    copies = [x for r in results["results"] for x in r["copy_gigabytes_per_second"]]
    run = (
        f"{results['date']}, {results['seconds'] / 60:.0f} minutes; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; "
        f"load average {load}"
    )
    bandwidth = (
        f"a copy on all cores moves {statistics.median(copies):.1f} GB/s "
        f"[{min(copies):.1f}-{max(copies):.1f}], bytes read and bytes written"
    )
    versions |= {"Python": machine["python"]}
    facts = [
        run,
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"threads: {threads}",
        bandwidth,
    ]
    explanation = (
        f"Times are medians of {results['repeats']} [fastest-slowest] milliseconds; "
        f"**x** is the ratio to `{OURS}`; then the first call, state and "
        "compilation included, in seconds."
    )
    lines = [f"`{results['command']}`", "", *(f"- {fact}" for fact in facts)]
    if results["quick"]:
        warning = "**A quick run on tiny tensors: its times mean nothing.**"
        lines = [warning, "", *lines]
    return [*lines, "", explanation]


def _goals_table(goals: list[dict[str, Any]]) -> list[str]:
    verdicts = {True: "pass", False: "**fail**", None: "not measured"}
    rows = [
        [
            verdicts[goal["passed"]],
            f"{goal['workload']}, {goal['optimizer']}",
            goal["goal"],
            goal["measured"] or "",
        ]
        for goal in goals
    ]
    return _table(["verdict", "workload, optimizer", "goal", "measured"], rows)


def _times_table(group: list[dict[str, Any]]) -> list[str]:
    names = list(group[0]["competitors"])
    rows = []
    for result in group:
        ours = result["competitors"][OURS].get("median")
        cells = [_time_cell(result["competitors"][name], ours) for name in names]
        rows.append([result["title"], *cells])
    return _table(["ms", *names], rows)


def _time_cell(entry: dict[str, Any], ours: float | None) -> str:
    if "error" in entry:
        return entry["error"].replace("|", "/")
    samples = entry["milliseconds"]
    spread = f"[{_number(min(samples))}-{_number(max(samples))}]"
    ratio = f"**{entry['median'] / ours:.2f}x**, " if ours else ""
    first = entry["first_call_seconds"]
    return f"{_number(entry['median'])} {spread}<br>{ratio}{first:.1f} s"


def _memory_table(group: list[dict[str, Any]]) -> list[str]:
    names = list(group[0]["competitors"])
    rows = []
    for result in group:
        cells = []
        for name in names:
            entry = result["competitors"][name]
            if "error" in entry:
                cells.append("")
                continue
            cell = f"{entry['state_bytes_per_parameter']:g}"
            if "bandwidth_share" in entry:
                cell += f", {entry['bandwidth_share']:.0%}"
            cells.append(cell)
        passes = result.get("array_passes")
        rows.append([result["title"], "" if passes is None else f"{passes:g}", *cells])
    header = ["bytes of state per parameter, share of the copy's bandwidth"]
    return _table([*header, "array passes", *names], rows)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _number(milliseconds: float) -> str:
    """Three digits: 0.123, 1.23, 12.3, 123, 1230."""
    digits = 3 if milliseconds < 1 else 2 if milliseconds < 10 else 1
    return f"{milliseconds:.{0 if milliseconds >= 100 else digits}f}"


def _by_workload(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["workload"], []).append(result)
    return groups


def progress_line(result: dict[str, Any]) -> str:
    times = [
        f"{name} {entry.get('error') or _number(entry['median']) + ' ms'}"
        for name, entry in result["competitors"].items()
    ]
    return f"{result['workload']}, {result['optimizer']}: {'; '.join(times)}"


# --------------------------------------------------------------- another version


def comparison(results: dict[str, Any], titles: dict[str, str]) -> str:
    """The table of `--against`."""
    machine, sides = results["machine"], results["software"]
    loads = [results["load_average_before"], results["load_average_after"]]
    versions = [
        f"{said}: tf_effopt {side['versions']['tf_effopt']}, commit "
        f"{side['commit'] or 'unknown'}, TensorFlow {side['versions']['tensorflow']}, "
        f"Keras {side['versions']['keras']}"
        for said, side in zip(
            ("this version", "the other"),
            (sides["this"], sides["other"]),
            strict=True,
        )
    ]
    lines = ["# The cost of one update beside another version", ""]
    if results["quick"]:
        lines += ["**A quick run on tiny tensors: its times mean nothing.**", ""]
    lines += [
        f"`{results['command']}`",
        "",
        (
            f"- {results['date']}, {results['seconds'] / 60:.0f} minutes; "
            f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; "
            f"load average {' to '.join(f'{x[0]:.1f}' for x in loads if x)}"
        ),
        *(f"- {version}" for version in versions),
        "",
        (
            f"Ratios are this version's time by the other's: the median of "
            f"{results['repeats']} pairs of blocks, and the interval that holds it with a "
            f"probability of {COVERAGE:.0%}, or with that which is printed. `ok` is an "
            f"interval whose lower end is under {LIMIT}. Times are medians."
        ),
        "",
    ]
    for workload, group in _by_workload(results["results"]).items():
        first = group[0]
        size = f"{first['tensors']} tensors, {first['parameters'] / 1e6:.1f} M"
        lines += [f"## {titles[workload]} ({size})", ""]
        rows = [_comparison_row(r) for r in group if "error" not in r]
        header = ["optimizer", "way", "ratio", "", "this, ms", "other, ms"]
        header += ["first call, ratio", "this, s", "other, s"]
        lines += [*_table(header, rows), ""] if rows else []
        left_out = [r for r in group if "error" in r]
        for result in left_out:
            name = f"{result['title']}, {result['way']}"
            lines.append(f"- left out: {name}: {result['error']}")
        lines += [""] if left_out else []
    return "\n".join(lines)


def _comparison_row(result: dict[str, Any]) -> list[str]:
    sides = [result["this"], result["other"]]
    first = [statistics.median(side["first_call_seconds"]) for side in sides]
    return [
        result["title"],
        result["way"],
        _ratio(result["ratio"]),
        "ok" if result["passed"] else "**slower**",
        *(_number(side["median"]) for side in sides),
        _ratio(result["first_call_ratio"]),
        *(f"{seconds:.2f}" for seconds in first),
    ]


def _ratio(ratio: dict[str, float]) -> str:
    text = f"{ratio['median']:.3f} [{ratio['low']:.3f}-{ratio['high']:.3f}]"
    if ratio["coverage"] < COVERAGE:
        text += f" ({ratio['coverage']:.0%})"
    return text


def comparison_line(result: dict[str, Any]) -> str:
    name = f"{result['workload']}, {result['optimizer']}, {result['way']}"
    if "error" in result:
        return f"{name}: left out: {result['error']}"
    verdict = "" if result["passed"] else f", slower: not under {LIMIT}"
    return (
        f"{name}: {_ratio(result['ratio'])}{verdict}; "
        f"first call {_ratio(result['first_call_ratio'])}"
    )


# ------------------------------------------------------------------- the picture

# Ours stands out; a library keeps its colour, a way to run its marker.
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#d1495b", "marker": "o", "s": 95, "zorder": 5},
    "tf_effopt eager": {"color": "#d1495b", "marker": "D", "s": 42, "zorder": 4},
    "Keras graph": {"color": "#30638e", "marker": "o", "s": 60},
    "Keras XLA": {"color": "#30638e", "marker": "^", "s": 60},
    "Keras eager": {"color": "#30638e", "marker": "D", "s": 42},
    "optax jit": {"color": "#3a9d6e", "marker": "s", "s": 50},
    "torch fused": {"color": "#edae49", "marker": "v", "s": 65},
}


def draw(results: dict[str, Any], titles: dict[str, str], path: pathlib.Path) -> None:
    """A panel for each workload, a row for each optimizer, a mark for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = _by_workload(results["results"])
    rows = [len(group) for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(10, 1.6 + sum(0.42 * n + 0.75 for n in rows)),
        height_ratios=[n + 0.4 for n in rows],
        squeeze=False,
        layout="constrained",
    )
    for axis, (workload, group) in zip(axes[:, 0], groups.items(), strict=True):
        _draw_workload(axis, group)
        axis.set_title(titles[workload], loc="left", fontsize=11, fontweight="bold")
    machine = results["machine"]
    axes[-1, 0].set_xlabel(
        f"milliseconds per update on {machine['cores']} cores of {machine['cpu']}: "
        "median and range, logarithmic"
    )
    figure.legend(handles=_legend(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_workload(axis: Any, group: list[dict[str, Any]]) -> None:
    from matplotlib import ticker

    for row, result in enumerate(group):
        axis.axhline(row, color="0.92", linewidth=6, zorder=0)
        for name, entry in result["competitors"].items():
            if "error" in entry:
                continue
            style, samples = STYLES[name], entry["milliseconds"]
            axis.hlines(
                row, min(samples), max(samples), color=style["color"], alpha=0.5
            )
            axis.scatter(
                entry["median"], row, **{"zorder": 3, "linewidths": 0.6} | style,
                edgecolors="white",
            )  # fmt: skip
        bound = result.get("milliseconds_at_copy_bandwidth")
        if bound is not None:
            axis.vlines(bound, row - 0.38, row + 0.38, color="0.35", linewidth=1.6)
    axis.set_yticks(range(len(group)), [result["title"] for result in group])
    axis.set_ylim(len(group) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=30))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(axis="x", color="0.85", linewidth=0.6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            color=STYLES[competitor.name]["color"],
            marker=STYLES[competitor.name]["marker"],
            markersize=STYLES[competitor.name]["s"] ** 0.5,
            label=competitor.name,
        )
        for competitor in COMPETITORS
    ]
    bound = Line2D([], [], linestyle="", color="0.35", marker="|", markersize=11)
    bound.set_label("at the speed of a copy")
    return [*handles, bound]
