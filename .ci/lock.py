"""Write or check requirements.lock: the exact versions of everything that ``.[dev]`` installs.

``python .ci/lock.py`` writes the versions of the current environment; ``--check`` verifies that the file has a version
for every requirement of pyproject.toml, and that no pinned package rejects another pin. Versions have no build tag: the
lock serves CPU and CUDA machines, and packages that only one of them installs are not in it.
"""

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = "# Exact versions for `pip install -c requirements.lock`. Written by `make lock`.\n"


def direct_requirements(extra: str) -> list[Requirement]:
    """The project's requirements with those of ``extra``, including extras that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    wanted = [extra]
    for name in wanted:
        for line in project["optional-dependencies"][name]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                wanted.extend(requirement.extras)
            else:
                found.append(requirement)
    return found


def requirements_of(requirement: Requirement) -> Iterator[Requirement]:
    """Requirements of an installed package that apply on this machine, with those of the extras asked for."""
    for line in distribution(requirement.name).requires or ():
        needed = Requirement(line)
        if any(needed.marker is None or needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
            yield needed


def all_requirements() -> list[Requirement]:
    """Direct and indirect requirements; a package occurs once per package that requires it."""
    found = direct_requirements("dev")
    expanded = set()
    for requirement in found:
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in expanded:
            expanded.add(key)
            found.extend(requirements_of(requirement))
    return found


def read_pins(path: Path = LOCK) -> dict[str, Version]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def faults(requirements: list[Requirement], pins: dict[str, Version]) -> list[str]:
    """Requirements without a pin, pins that a requirement rejects, and pins that nothing requires."""
    found = []
    for requirement in requirements:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            found.append(f"{requirement.name}: no version in {LOCK.name}")
        elif not requirement.specifier.contains(pin, prereleases=True):
            found.append(f"{requirement.name}: {LOCK.name} has {pin}, but {requirement} is required")
    unneeded = set(pins) - {canonicalize_name(requirement.name) for requirement in requirements}
    return sorted({*found, *(f"{name}: nothing requires it" for name in unneeded)})


def main() -> int:
    requirements = all_requirements()
    if "--check" in sys.argv[1:]:
        found = faults(requirements, read_pins())
        for fault in found:
            print(f"{fault}; run `make lock`", file=sys.stderr)
        return 1 if found else 0
    names = sorted({canonicalize_name(requirement.name) for requirement in requirements})
    LOCK.write_text(HEADER + "".join(f"{name}=={Version(distribution(name).version).public}\n" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
