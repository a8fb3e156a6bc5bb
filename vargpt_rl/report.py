"""The summary of a run, and the table that closes it on the terminal."""

from rich.console import Console
from rich.table import Table


def _score(result: dict | None) -> str:
    if not result or "overall" not in result:
        return "-"
    return f"{result['overall']:.3f} ± {result['overall_stderr']:.3f}"


def _number(result: dict | None, key: str, form: str) -> str:
    return format(result[key], form) if result and key in result else "-"


def closing_table(summary: dict) -> Table:
    """What each stage of each iteration reached on held-out prompts and pairs."""
    table = Table(title="held-out prompts and pairs", title_justify="left")
    for column in ("iteration", "px", "policy", "score", "single object", "margin", "accuracy", "chosen log-prob"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    names = {"after_sft": "after SFT", "after_dpo": "after DPO", "sft_on_winners": "control: SFT on winners"}
    for k, iteration in enumerate(summary["iterations"]):
        for key, name in names.items():
            if result := iteration["eval"].get(key):
                table.add_row(
                    str(k),
                    str(iteration["resolution"]),
                    name,
                    _score(result),
                    _number(result, "single_object", ".3f"),
                    _number(result, "margin", "+.3f"),
                    _number(result, "accuracy", ".3f"),
                    _number(result, "chosen_logp_change", "+.1f"),
                )
        table.add_section()
    return table


def show(summary: dict, directory: object) -> None:
    """Print the closing table and where everything is."""
    console = Console()
    console.width = max(console.width, 120)  # the table needs as much; a narrower terminal wraps it
    if summary["iterations"]:
        console.print(closing_table(summary))
    for name, result in summary["stages"].items():
        first, last = result["loss_first"], result["loss_last"]
        console.print(f"{name}: loss {first:.3f} -> {last:.3f} in {result['steps']} steps")
    for moment, result in summary["understanding"].items():
        if result:
            accuracy, error = result["accuracy"], result["accuracy_stderr"]
            console.print(f"questions answered right {moment} the iterations: {accuracy:.3f} ± {error:.3f}")
    if best := summary["best"]:
        place = f"iteration {best['iteration']}, {best['resolution']} px"
        console.print(f"best/ holds the policy of {place}: {best['metric']} {best['value']:.4g}")
    if summary["quarantined"]:
        console.print(f"quarantined: {summary['quarantined']}")
    for event in summary["events"]:
        console.print(event)
    console.print(f"{summary['seconds']:.0f} s; everything is in {directory}")
