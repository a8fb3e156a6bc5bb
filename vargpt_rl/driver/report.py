"""The tables that a run prints at its end."""

from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from learners.methods import ONLINE
from vargpt_rl.common.console import wide_console
from vargpt_rl.common.logs import RECORD
from vargpt_rl.stages import STAGES

PARTS = ("draw", "judge", "learn", "swap")
"""Parts of an update of an online method whose time is shown."""


def _number(result: dict | None, key: str, form: str) -> str:
    return format(result[key], form) if result and key in result else "-"


def _with_error(result: dict, key: str) -> str:
    return f"{result[key]:.3f} ± {result[f'{key}_stderr']:.3f}"


def _measure(result: dict | None) -> str:
    """Format a held-out measure with its standard error."""
    for key, unit in (("overall", ""), ("accuracy", ""), ("psnr", " dB")):
        if result and f"{key}_stderr" in result:  # the accuracy on pairs has no error of its own and is no measure
            return f"{_with_error(result, key)}{unit}"
    return "-"


def _gain(result: dict, key: str) -> str:
    """Format a paired difference with its standard error."""
    return f"{result[key]:+.3f} ± {result[f'{key}_stderr']:.3f}" if key in result else "-"


def stage_table(stages: dict[str, dict]) -> Table:
    """Return the results of the stages before and after the iterations."""
    table = Table(title="stages", title_justify="left")
    for column in ("stage", "px", "steps", "loss", "held out", "before", "after"):
        table.add_column(column, justify="left" if column in ("stage", "held out") else "right")
    for name, result in stages.items():
        table.add_row(
            name,
            str(result["resolution"]),
            str(result["steps"]),
            f"{result['loss_first']:.3f} -> {result['loss_last']:.3f}",
            STAGES[name].measure or "-",
            _measure(result.get("before")),
            _measure(result["eval"]),
        )
    return table


def closing_table(summary: dict) -> Table:
    """Return the results of each stage of each iteration on held-out prompts and pairs."""
    table = Table(title="held-out prompts and pairs (control: SFT on the winners)", title_justify="left")
    results = [result for iteration in summary["iterations"] for result in iteration["eval"].values() if result]
    judges = [name for name in ("reward", "judge") if any(f"{name}_stderr" in result for result in results)]
    for column in ("#", "px", "policy", "n", "score", "over SFT", "over control", *judges, "margin", "accuracy"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    names = {
        "after_sft": "after SFT",
        "sft_on_winners": "control",
        "after_dpo": "after DPO",
        **{f"after_{name}": f"after {method.title}" for name, method in ONLINE.items()},
    }
    for k, iteration in enumerate(summary["iterations"]):
        for key, name in names.items():
            if result := iteration["eval"].get(key):
                table.add_row(
                    str(k),
                    str(iteration["resolution"]),
                    name,
                    _number(result, "n", "d"),
                    _measure(result),
                    _gain(result, "gain_over_sft"),
                    _gain(result, "gain_over_control"),
                    *(_with_error(result, judge) if f"{judge}_stderr" in result else "-" for judge in judges),
                    _number(result, "margin", "+.1f"),
                    _number(result, "accuracy", ".3f"),
                )
        table.add_section()
    return table


def method_table(iterations: list[dict]) -> Table:
    """Return what the online methods did: first and last figures, seconds of an update by part."""
    table = Table(title="online methods", title_justify="left")
    columns = ("#", "px", "method", "reward", "judge", "diversity")
    for column in (*columns, *(f"{part} s" for part in PARTS)):
        table.add_column(column, justify="left" if column == "method" else "right")
    for k, iteration in enumerate(iterations):
        for name in [name for name in ONLINE if name in iteration]:
            result = iteration[name]
            seconds = result["seconds_per_update"]
            table.add_row(
                str(k),
                str(iteration["resolution"]),
                ONLINE[name].title,
                *(_change(result, figure) for figure in ("reward", "judge", "diversity")),
                *(_number(seconds, part, ".1f") for part in PARTS),
            )
    return table


def _change(result: dict, figure: str) -> str:
    """Format the first and last value of a figure."""
    if f"{figure}_first" not in result:
        return "-"
    return f"{result[f'{figure}_first']:.3f} -> {result[f'{figure}_last']:.3f}"


def _learned(result: dict) -> str:
    """Describe a learned reward: its accuracy on held-out pairs, and its agreement with the exact check."""
    names = {
        "accuracy_winners": "on held-out pairs with winners",
        "accuracy_own": "on held-out pairs of own images",
        "agreement": "agreement with the exact check on held-out images",
    }
    found = [f"{text} {_with_error(result, key)}" for key, text in names.items() if key in result]
    return f"learned reward: {', '.join(found)}"


def training_time(summary: dict) -> str:
    """Return the shares of all training time by part, of rank 0, and each stage's MFU; empty if nothing was trained.

    A stage of several iterations has the mean of its utilisations.
    """
    stages = [*summary["stages"].items()]
    stages += [entry for iteration in summary["iterations"] for entry in iteration.items()]
    total: Counter[str] = Counter()
    found: dict[str, list[float]] = defaultdict(list)
    for name, result in stages:
        if isinstance(result, dict) and "time" in result:
            total.update(result["time"])
            if "mfu" in result:
                found[name].append(result["mfu"])
    whole = total.total()
    if not whole:
        return ""
    shares = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in total.items())
    used = ", ".join(f"{name} {fmean(values):.0%}" for name, values in found.items())
    return f"{shares}; model FLOPs utilisation: {used}" if used else shares


def _print_remarks(console: Console, summary: dict) -> None:
    """Print what no table has."""
    for k, iteration in enumerate(summary["iterations"]):
        if learned := iteration.get("learned_reward"):
            console.print(f"iteration {k}: {_learned(learned)}")
    for moment, result in summary["understanding"].items():
        if result:
            accuracy, error = result["accuracy"], result["accuracy_stderr"]
            console.print(f"questions answered right {moment} the iterations: {accuracy:.3f} ± {error:.3f}")
    if best := summary["best"]:
        place = f"iteration {best['iteration']}, {best['resolution']} px"
        console.print(f"best/ holds the policy of {place}: {best['metric']} {best['value']:.4g}")
    if summary["quarantined"]:
        console.print(f"quarantined: {summary['quarantined']}")
    if shares := training_time(summary):
        console.print(f"training time: {shares}", highlight=False)
    for event in summary["events"]:
        console.print(event)


def next_steps(directory: Path) -> list[str]:
    """Return what to do with a finished run: files to look at and commands."""
    page = directory / "report.html"
    grids = sorted(path for path in directory.glob("samples/*.png") if not path.stem.endswith("-pairs"))
    found = [f"look at   {path}" for path in ([page] if page.exists() else grids[-1:])]
    if (directory / "model").exists():
        found += [
            f"draw      vargpt-rl draw PROMPT checkpoint={directory / 'model'}",
            f"chat      vargpt-rl chat checkpoint={directory / 'model'}",
        ]
    return found


def show(summary: dict, directory: Path) -> None:
    """Print the closing tables and what to do next, and record them in the run's log."""
    console = wide_console()
    console.record = True
    if summary["stages"]:
        console.print(stage_table(summary["stages"]))
    if summary["iterations"]:
        console.print(closing_table(summary))
    if any(name in iteration for name in ONLINE for iteration in summary["iterations"]):
        console.print(method_table(summary["iterations"]))
    _print_remarks(console, summary)
    console.print(f"{summary['seconds']:.0f} s; everything is in {directory}")
    if steps := next_steps(directory):
        console.print("next:")
    for step in steps:
        console.print(f"  {step}", highlight=False, soft_wrap=True)
    RECORD.info("summary\n%s", console.export_text())
