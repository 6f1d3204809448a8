"""Every kernel configuration that dispatch can choose compiles for sm_80, sm_90 and sm_100 as it should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import compile_helpers
import pytest
from compile_helpers import MODULES, SHARED_LIMIT, table


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, compile_helpers.__file__, "--json", str(folder / "rows.json")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads((folder / "rows.json").read_text())


def _described(row):
    return {key: row[key] for key in ("kernel", "chip", "num_warps", "registers", "shared_bytes", "types", "constants")}


@pytest.mark.slow
def test_no_configuration_spills_or_wants_more_shared_memory_than_there_is(rows, capsys):
    with capsys.disabled():
        print("\n" + table(rows))
    assert {row["chip"] for row in rows} == set(SHARED_LIMIT)
    assert not [_described(row) for row in rows if row["local_accesses"] or row["stack_bytes"]]
    assert not [_described(row) for row in rows if row["shared_bytes"] > SHARED_LIMIT[row["chip"]]]


@pytest.mark.slow
def test_products_run_on_tensor_cores(rows):
    def is_exact(row):  # float32 products keep float32's precision, which tensor cores do not have
        return "*fp32" in (row["types"].get("q_ptr"), row["types"].get("q"))

    products = [row for row in rows if row["has_product"] and not is_exact(row)]
    assert products
    assert not [_described(row) for row in products if not row["tensor_cores"]]


@pytest.mark.slow
def test_every_kernel_is_compiled(rows):
    import importlib
    import pkgutil

    import cocomix_kernels

    compiled = {row["kernel"] for row in rows}
    for info in pkgutil.walk_packages(cocomix_kernels.__path__, "cocomix_kernels."):
        module = importlib.import_module(info.name)
        source = Path(module.__file__).read_text()
        started = {name for name in vars(module) if re.search(rf"\blaunch\(\s*{name},", source)}
        assert started <= compiled, f"{info.name}: add the launches to one of {', '.join(MODULES)}"
