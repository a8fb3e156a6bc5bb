"""Watch a run: its page, live: ``python -m vargpt_rl.page.watch RUN [port=N]``.

The page follows the run within seconds. It is served to this machine alone, with a secret in the address. The run is
only read, so it may be anywhere that this machine sees. Exit codes: 0 stopped by Ctrl-C, 2 no run directory.
"""

import hashlib
import sys
import threading
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import print_usage_if_asked
from vargpt_rl.page.contents import holder_lives, read_run
from vargpt_rl.page.render import render
from vargpt_rl.page.serving import new_token, private_app, serve

USAGE = """\
usage: python -m vargpt_rl.page.watch RUN [port=N]

Serves RUN's page on 127.0.0.1; it follows the run. Open the address that is printed. Ctrl-C ends it.
"""
FOLLOWED = (
    "state.json",
    "metrics.jsonl",
    "summary.json",
    "evaluations/*.jsonl",
    "preferences/*.parquet",
    "samples/*.png",
)
"""Files whose change makes a new version of the page."""


def version_of(folder: Path) -> str:
    """Return a digest of names, sizes and times of the followed files, and of whether the run's process lives.

    It is asked for every 1.5 s, so no file but the holder's is read. ValueError if the folder is gone.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: the run is no longer here, it was renamed or removed")
    digest = hashlib.blake2b(str(holder_lives(folder)).encode(), digest_size=8)
    for pattern in FOLLOWED:
        for path in sorted(folder.glob(pattern)):
            try:
                stat = path.stat()
            except FileNotFoundError:  # it has just been replaced or removed
                continue
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns};".encode())
    return digest.hexdigest()


def make_app(folder: Path, token: str) -> FastAPI:
    """Return the app that shows a run; pages are made one at a time and kept until the run changes."""
    app = private_app(token)
    lock = threading.Lock()
    made: dict[bool, tuple[str, str]] = {}

    @app.get("/", response_class=HTMLResponse)
    def page(part: bool = False) -> str:
        with lock:
            version = version_of(folder)
            if made.get(part, ("", ""))[0] != version:
                made[part] = version, render([read_run(folder)], live=f"/version?token={token}", library=not part)
            return made[part][1]

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": version_of(folder)}

    return app


def watch(folder: Path, port: int = 0) -> None:
    """Serve the live page of a run until Ctrl-C. ValueError if there is no run, OSError if the port is taken."""
    read_run(folder)
    token = new_token()
    serve(make_app(folder, token), token, port, lambda address: print(f"watching {folder}: {address}", flush=True))


def main(arguments: list[str] | None = None) -> int:
    """Watch a run; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    print_usage_if_asked(USAGE, arguments)
    ports = [each.removeprefix("port=") for each in arguments if each.startswith("port=")]
    folders = [Path(each) for each in arguments if not each.startswith("port=")]
    try:
        if len(folders) != 1:
            raise ValueError(f"expected one run directory, got {len(folders)}")
        watch(folders[0], int(ports[0]) if ports else 0)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
