"""What is pinned fits what setup.py admits: constraints.txt within the ranges, constraints-oldest.txt at their ends."""

import runpy
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def admitted(*parts: str) -> dict[str, Requirement]:
    """What an installation with these extras requires, by name."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    lines = [*arguments["install_requires"], *(line for part in parts for line in arguments["extras_require"][part])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pinned(file: str) -> dict[str, Version]:
    """The versions of a constraints file, by name."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_pinned_versions_are_admitted():
    versions = pinned("constraints.txt")
    for name, requirement in admitted("dev").items():
        assert versions[name] in requirement.specifier, name


def test_the_oldest_versions_are_the_lowest_that_are_admitted():
    versions = pinned("constraints-oldest.txt")
    for name, requirement in admitted("train", "report", "test").items():
        floors = [Version(clause.version) for clause in requirement.specifier if clause.operator == ">="]
        if name == "torch":
            assert versions[name] == pinned("constraints.txt")[name]  # the file says why
        elif floors:
            assert versions[name] in requirement.specifier, name
            assert versions[name].release[: len(floors[0].release)] == floors[0].release, name
