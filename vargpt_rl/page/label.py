"""A local page on which people label pairs: ``vargpt-rl pairs RUN``.

Keys: 1 left, 2 right, 3 alike, 4 both bad, u undo, s skip. Sides are shuffled and origins hidden. Each answer is on
disk before the next pair is shown. Several raters may use several browsers.
"""

import threading
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from vargpt_rl.page.contents import RunContents, read_run
from vargpt_rl.page.labels import (
    RATER,
    Label,
    add_label,
    check_writable,
    labelled_pairs,
    labels_file,
    read_labels,
    summarise_labels,
    tasks_for,
    undo,
    winner_of,
)
from vargpt_rl.page.render import render_template
from vargpt_rl.page.serving import new_token, private_app, serve

Rater = Annotated[str, Field(pattern=f"^{RATER.pattern}$")]


class Answer(BaseModel):
    """An answer of a rater to the pair that is shown at a position."""

    rater: Rater
    position: int
    side: Literal["left", "right", "alike", "bad"] | None = None
    seconds: float = Field(ge=0, allow_inf_nan=False)


def answers_of(folder: Path, rater: str) -> int:
    """Return how many answers of a rater stand. ValueError naming file and line if they are damaged."""
    return len(read_labels(labels_file(folder, rater)))


def show_task(run: RunContents, rater: str) -> dict[str, object]:
    """Return the next pair of a rater, without origin, with the progress; at the end the summary instead."""
    done = answers_of(run.folder, rater)
    tasks = tasks_for(labelled_pairs(run), rater)
    found: dict[str, object] = {"position": done, "total": len(tasks)}
    if done >= len(tasks):
        return found | {"finished": True, "summary": summarise_labels(run)}
    task = tasks[done]
    sides = run.pair_images(task.stage, task.row.pair_id, run.labelled_kind(task.stage))
    left, right = reversed(sides) if task.flipped else sides
    return found | {"finished": False, "prompt": task.row.prompt, "left": left, "right": right}


def keep_answer(run: RunContents, answer: Answer) -> None:
    """Write an answer, unless another tab of the rater was quicker."""
    tasks = tasks_for(labelled_pairs(run), answer.rater)
    if answer.position != answers_of(run.folder, answer.rater) or answer.position >= len(tasks):
        return
    task = tasks[answer.position]
    add_label(
        run.folder,
        Label(
            pair_id=task.row.pair_id,
            stage=task.stage,
            winner=winner_of(answer.side, task.flipped),
            rater=answer.rater,
            seconds=round(answer.seconds, 2),
            flipped=task.flipped,
            again=task.again,
        ),
    )


def make_app(folder: Path, token: str) -> FastAPI:
    """Return the app on which the pairs of a run are labelled.

    The run is read at each request, so that pairs of later iterations appear. ValueError if no images of pairs are
    kept, OSError if labels cannot be written.
    """
    if not labelled_pairs(read_run(folder)):
        raise ValueError(
            f"{folder}: there is nothing to label, as no images of pairs are kept here (tracking.table_rows)"
        )
    check_writable(folder)
    app = private_app(token)
    writing = threading.Lock()  # two tabs of one rater

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return render_template("label.html", name=folder.resolve().name)

    @app.get("/next")
    def following(rater: Rater) -> dict[str, object]:
        return show_task(read_run(folder), rater)

    @app.post("/label")
    def label(answer: Answer) -> dict[str, int]:
        with writing:
            keep_answer(read_run(folder), answer)
            return {"position": answers_of(folder, answer.rater)}

    @app.post("/undo")
    def back(rater: Rater) -> dict[str, int]:
        with writing:
            undo(folder, rater)
            return {"position": answers_of(folder, rater)}

    return app


def label_pairs(folder: Path, port: int = 0) -> None:
    """Serve the page until Ctrl-C. ValueError if there is nothing to label, OSError if the port is taken."""
    token = new_token()
    serve(
        make_app(folder, token), token, port, lambda address: print(f"label pairs of {folder}: {address}", flush=True)
    )
