"""A local page on which people label pairs: ``vargpt-rl pairs RUN``.

Keys: 1 left, 2 right, 3 alike, 4 both bad, u undo, s skip. Sides are shuffled and origins hidden. Each answer is on
disk before the next pair is shown. Several raters may use several browsers.
"""

import threading
from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from vargpt_rl.page.contents import RunContents, read_run
from vargpt_rl.page.labels import (
    Label,
    add_label,
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


class Answer(BaseModel):
    """An answer of a rater to the pair that is shown at a position."""

    rater: str
    position: int
    side: str | None = None
    seconds: float = Field(ge=0, allow_inf_nan=False)


def show_task(run: RunContents, rater: str) -> dict[str, object]:
    """Return the next pair of a rater, without origin, with the progress; at the end the summary instead."""
    try:
        done = len(read_labels(labels_file(run.folder, rater)))
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    tasks = tasks_for(labelled_pairs(run), rater)
    found: dict[str, object] = {"position": done, "total": len(tasks)}
    if done >= len(tasks):
        return found | {"finished": True, "summary": summarise_labels(run)}
    task = tasks[done]
    sides = run.pair_images(task.stage, task.row.pair_id, run.labelled_kind(task.stage))
    left, right = reversed(sides) if task.flipped else sides
    return found | {"finished": False, "prompt": task.row.prompt, "left": left, "right": right}


def keep_answer(run: RunContents, answer: Answer) -> dict[str, object]:
    """Write an answer, unless another tab of the rater was quicker; return what to show next."""
    shown = show_task(run, answer.rater)
    if answer.position != shown["position"] or shown["finished"]:
        return shown
    task = tasks_for(labelled_pairs(run), answer.rater)[answer.position]
    try:
        winner = winner_of(answer.side, task.flipped)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    add_label(
        run.folder,
        Label(
            pair_id=task.row.pair_id,
            stage=task.stage,
            winner=winner,
            rater=answer.rater,
            seconds=round(answer.seconds, 2),
            flipped=task.flipped,
            again=task.again,
        ),
    )
    return show_task(run, answer.rater)


def make_app(folder: Path, token: str) -> FastAPI:
    """Return the app on which the pairs of a run are labelled. ValueError if no images of pairs are kept."""
    run = read_run(folder)
    if not labelled_pairs(run):
        raise ValueError(
            f"{folder}: there is nothing to label, as no images of pairs are kept here (tracking.table_rows)"
        )
    app = private_app(token)
    writing = threading.Lock()  # two tabs of one rater

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return render_template("label.html", name=run.name)

    @app.get("/next")
    def following(rater: str) -> dict[str, object]:
        return show_task(run, rater)

    @app.post("/label")
    def label(answer: Answer) -> dict[str, object]:
        with writing:
            return keep_answer(run, answer)

    @app.post("/undo")
    def back(rater: str) -> dict[str, object]:
        with writing:
            show_task(run, rater)  # refuses a name that is none
            undo(folder, rater)
            return show_task(run, rater)

    return app


def label_pairs(folder: Path, port: int = 0) -> None:
    """Serve the page until Ctrl-C. ValueError if there is nothing to label, OSError if the port is taken."""
    token = new_token()
    serve(
        make_app(folder, token), token, port, lambda address: print(f"label pairs of {folder}: {address}", flush=True)
    )
