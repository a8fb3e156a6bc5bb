"""Memory that this process may use, the machine's or the limit of its container or job, and the most that it used."""

import os
import resource
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
CLEAR = Path("/proc/self/clear_refs")


def available_memory() -> int:
    """Return the machine's memory in bytes, or the lowest limit of this process's control groups (v1 and v2)."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> list[int]:
    """Return the limits that are set in this process's groups and those above. A container sees its own at the root."""
    places = [(CGROUPS, "memory.max"), (CGROUPS / "memory", "memory.limit_in_bytes")]
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        kind = 0 if not controllers else 1 if "memory" in controllers.split(",") else None
        if kind is not None:
            root, file = places[kind]
            own = root / path.lstrip("/")
            places += [(folder, file) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    found = []
    for folder, file in places:
        try:
            text = (folder / file).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # else "max"
            found.append(int(text))
    return found


def forget_peak() -> None:
    """Let `peak_memory` count from now on, where the system can forget a peak."""
    with suppress(OSError):  # not Linux, or a container that forbids it: the peak is then that of the whole process
        CLEAR.write_text("5")


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
