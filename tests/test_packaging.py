"""The package as others get it: the wheel by itself, and both kinds of editable installation, from a clean copy."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/openwebtext/69m.yaml"
PLAN = ["plan", str(CONFIG), "--gpus", "8", "--cluster", "h100", "--vocab-size", "50257"]

pytestmark = pytest.mark.slow


def run(*command, cwd):
    """Standard output of a command, which must end well. Nothing of this checkout is on its path."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=outside, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what an installation reads, without anything that installations or tests left in this one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    for name in ("engine", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout):
    """The wheel of the copy."""
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "wheel",
        ".",
        cwd=checkout,
    )
    [found] = (checkout / "wheel").glob("*.whl")
    return found


def environment(folder):
    """A new environment with nothing of its own, which finds this one's libraries, but none of its packages of ours."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    libraries = folder / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "cocomix" not in entry.name:
            (libraries / entry.name).symlink_to(entry)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "libraries.pth").write_text(f"{libraries}\n")
    return python


def assert_works(python, package_folder, cwd):
    """Both packages are there, from `package_folder`, and so is what lies beside their code."""
    code = "import cocomix, cocomix_kernels; print(cocomix.__file__, cocomix_kernels.__file__)"
    files = [Path(file).resolve() for file in run(python, "-c", code, cwd=cwd).split()]
    assert all(package_folder in file.parents for file in files), files
    command = python.with_name("cocomix")
    assert "0.2.0" in run(command, "--version", cwd=cwd)
    assert "tokens/s" in run(command, *PLAN, cwd=cwd)
    assert "usage" in run(python, "-m", "cocomix", "train", "--help", cwd=cwd)


def test_the_wheel_holds_every_module_and_what_lies_beside_them(checkout, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for root in ("engine", "kernels"):
        files = {file for file in (checkout / root).rglob("*") if file.is_file() and "egg-info" not in str(file)}
        expected = {file.relative_to(checkout / root).as_posix() for file in files if file.suffix != ".md"}
        assert expected <= names, expected - names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "engine", "kernels"))]
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "License-Expression: MIT" in metadata and "Project-URL: " in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_in_an_environment_of_its_own(tmp_path, wheel):
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert_works(python, tmp_path / "venv", tmp_path)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_installations_work(tmp_path, checkout, mode):
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns("wheel", "build", "*.egg-info"))
    python = environment(tmp_path / "venv")
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--config-settings",
        f"editable_mode={mode}",
        "-e",
        ".",
        cwd=copy,
    )
    assert_works(python, copy, tmp_path)
    module = copy / "engine/cocomix/core/errors.py"
    module.write_text(module.read_text() + "\nEDITED = 1\n")
    assert run(python, "-c", "from cocomix.core.errors import EDITED; print(EDITED)", cwd=tmp_path) == "1\n"
