"""The tables that a run prints at its end."""

import os
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from learners.methods import ONLINE
from vargpt_rl.common.console import print_table, wide_console
from vargpt_rl.common.logs import RECORD
from vargpt_rl.common.usage import command_line
from vargpt_rl.evaluate.wording import MOMENTS, WITHOUT_SFT, agreement, gain_of, verdict, with_bounds
from vargpt_rl.stages import STAGES

PARTS = ("draw", "judge", "learn", "swap")
"""Parts of the time that an online method takes for a batch, with all updates on it."""


def _number(result: dict | None, key: str, form: str) -> str:
    return format(result[key], form) if result and key in result else "-"


def _measure(result: dict | None) -> str:
    """Format a held-out measure with its interval, or its standard error."""
    for key, unit in (("overall", ""), ("accuracy", ""), ("psnr", " dB")):
        if result and {f"{key}_low", f"{key}_stderr"} & result.keys():
            return f"{with_bounds(result, key)}{unit}"
    return "-"


def _score(result: dict) -> str:
    """Format the score of held-out images; the accuracy beside it is that of pairs."""
    return with_bounds(result, "overall") if "overall" in result else "-"


def _gain(result: dict, name: str) -> str:
    """Format a paired difference: its mean with its standard error, and how many images are better and worse."""
    found = gain_of(result, name)
    if found is None:
        return "-"
    return f"{found['gain']:+.3f} ± {found['stderr']:.3f} (+{found['better']} -{found['worse']})"


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


CONTROL = "sft_on_winners"
"""Key of the control among an iteration's results."""


def closing_table(summary: dict) -> Table:
    """Return the results of each policy of each iteration on held-out prompts, and on pairs where there are any."""
    measured = _measured(summary)
    title = "held-out images"
    if any("margin" in result for *_, result in measured):
        title += " and pairs"
    if any(name == "control" for _, _, name, _ in measured):
        title += " (control: SFT on the winners)"
    table = Table(title=title, title_justify="left")
    judges = [name for name in ("reward", "judge") if any(name in result for *_, result in measured)]
    scored = [result for *_, result in measured if {"overall", "reward"} & result.keys()]
    same = bool(scored) and all(result.get("reward") == result.get("overall") for result in scored)
    if same:  # the reward is the check that scores, as in the demo
        judges.remove("reward")
    for column in ("#", "px", "policy", "n", "score = reward" if same else "score", *judges, "margin", "accuracy"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for k, iteration, name, result in measured:
        table.add_row(
            str(k),
            str(iteration["resolution"]),
            name if name in ("control", "start") else f"after {name}",
            _number(result, "n", "d"),
            _score(result),
            *(with_bounds(result, judge) if judge in result else "-" for judge in judges),
            _number(result, "margin", "+.1f"),
            with_bounds(result, "accuracy") if "margin" in result else "-",
        )
    return table


def comparison_table(summary: dict) -> Table:
    """Return the paired comparisons: the same prompts and seeds, image by image."""
    table = Table(title="same prompts and seeds, image by image (+better -worse)", title_justify="left")
    titles = {_titles(iteration)["after_sft"] for iteration in summary["iterations"]}
    for column in ("#", "px", "policy", f"over {' or '.join(sorted(titles))}", "p", "over control", "p"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for k, iteration, name, result in _measured(summary):
        columns = [
            (_gain(result, baseline), _number(result, f"{baseline}_p", ".2g"))
            for baseline in ("gain_over_sft", "gain_over_control")
        ]
        if columns != [("-", "-")] * 2:
            table.add_row(str(k), str(iteration["resolution"]), name, *columns[0], *columns[1])
    return table


def verdicts(summary: dict) -> list[str]:
    """Return a sentence for each iteration: its last policy against SFT, or its start, on the same images."""
    last = {k: (iteration, name, result) for k, iteration, name, result in _measured(summary) if name != "control"}
    return [
        f"iteration {k}, {iteration['resolution']} px: {verdict(name, _titles(iteration)['after_sft'], found)}"
        for k, (iteration, name, result) in last.items()
        if (found := gain_of(result, "gain_over_sft"))
    ]


def _measured(summary: dict) -> list[tuple[int, dict, str, dict]]:
    """Return number and results of the iteration, name and results of the policy, for each that was measured."""
    return [
        (k, iteration, name, result)
        for k, iteration in enumerate(summary["iterations"])
        for key, name in _titles(iteration).items()
        if (result := iteration["eval"].get(CONTROL if key == "control" else key))
    ]


def _titles(iteration: dict) -> dict[str, str]:
    """Return the titles of an iteration's moments."""
    return MOMENTS if "sft" in iteration else WITHOUT_SFT


def method_table(iterations: list[dict]) -> Table:
    """Return what the online methods did: first and last figures, seconds of a batch by part."""
    table = Table(title="online methods", title_justify="left")
    columns = ("#", "px", "method", "reward", "judge", "diversity")
    for column in (*columns, *(f"{part} s" for part in PARTS)):
        table.add_column(column, justify="left" if column == "method" else "right")
    for k, iteration in enumerate(iterations):
        for name in [name for name in ONLINE if name in iteration]:
            result = iteration[name]
            seconds = result["seconds_per_batch"]
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
        "accuracy_given": "on held-out pairs of people",
        "agreement": "agreement with the exact check on held-out images",
    }
    found = [f"{text} {with_bounds(result, key)}" for key, text in names.items() if key in result]
    return f"learned reward: {', '.join(found)}"


def _people(pairs: dict) -> list[str]:
    """Say how many pairs people have judged, what was left out, and how often each reward agrees with them."""
    if "people" not in pairs:
        return []
    left_out = ", ".join(f"{count} {reason}" for reason, count in pairs["dropped_by_reason"].items() if count)
    told = [f"{pairs['built']} pairs judged by people" + (f"; left out: {left_out}" if left_out else "")]
    return told + [f"{name} agrees with people on {agreement(found)}" for name, found in pairs["people"].items()]


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


def next_steps(directory: Path) -> list[str]:
    """Return what to do with a finished run: files to look at and commands."""
    page = directory / "report.html"
    grids = sorted(directory.glob("samples/*.png"))
    found = [f"look at   {path}" for path in ([page] if page.exists() else grids[-1:])]
    if (directory / "model").exists():
        found += [
            f"draw      {command_line('draw', 'PROMPT', f'checkpoint={directory}/model')}",
            f"chat      {command_line('chat', f'checkpoint={directory}/model')}",
            f"continue  {command_line('run', f'checkpoint={directory}/model', 'name=NAME')}",
        ]
    return found


def show(summary: dict, directory: Path) -> None:
    """Print the closing tables and what to do next, and record them in the run's log."""
    console = Console() if "COLUMNS" in os.environ else wide_console()
    console.record = True
    for table in _tables(summary):
        print_table(without_empty_columns(table), console)
    for line in _remarks(summary):
        console.print(Text(line), soft_wrap=not console.is_terminal)
    console.print(Text(f"{summary['seconds']:.0f} s; everything is in {directory}"), soft_wrap=True)
    if steps := next_steps(directory):
        console.print("next:")
    for step in steps:
        console.print(Text(f"  {step}"), soft_wrap=True)
    RECORD.info("summary\n%s", console.export_text())


def without_empty_columns(table: Table) -> Table:
    """Return a table without the columns in which no row has a value."""
    kept = [column for column in table.columns if any(cell != "-" for cell in column.cells)]
    shown = Table(title=table.title, title_justify="left")
    for column in kept:
        shown.add_column(column.header, justify=column.justify)
    for row in zip(*(column.cells for column in kept), strict=True):
        shown.add_row(*row)
    return shown


def _tables(summary: dict) -> list[Table]:
    """Return the tables that have rows."""
    tables = [
        stage_table(summary["stages"]),
        closing_table(summary),
        comparison_table(summary),
        method_table(summary["iterations"]),
    ]
    return [table for table in tables if table.row_count]


def _remarks(summary: dict) -> list[str]:
    """Return the lines below the tables: verdicts, learned rewards, questions, the best policies, events."""
    lines = verdicts(summary)
    for k, iteration in enumerate(summary["iterations"]):
        if learned := iteration.get("learned_reward"):
            lines.append(f"iteration {k}: {_learned(learned)}")
        lines += [f"iteration {k}: {told}" for told in _people(iteration.get("pairs") or {})]
    for moment, result in summary["understanding"].items():
        if result:
            lines.append(f"questions answered right {moment} the iterations: {with_bounds(result, 'accuracy')}")
    for best in summary["best"] or []:
        told = f"{best['metric']} {best['value']:.4g}"
        lines.append(f"{best['path']} holds the policy of iteration {best['iteration']}: {told}")
    if summary["quarantined"]:
        lines.append(f"quarantined: {summary['quarantined']}")
    if shares := training_time(summary):
        lines.append(f"training time: {shares}")
    return lines + summary["events"]
