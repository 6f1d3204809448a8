"""The house: imports go down only, at the top of files and inside functions alike, and every module has its tests."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"cocomix": ROOT / "engine/cocomix", "cocomix_kernels": ROOT / "kernels/cocomix_kernels"}

# Rooms by floor: a room may import from the floors below it, and from itself.
FLOORS = {
    "cocomix": [
        {"core"},
        {"data", "model"},
        {"distributed"},
        {"teacher"},
        {"training"},
        {"inference", "costs"},
        {"report"},
        {"commands"},
        {"cli"},
    ],
    "cocomix_kernels": [
        {"common"},
        {"concept_head", "attribution", "concept_mix", "attention", "lm_loss"},
        {"reference"},
    ],
}


def modules() -> dict[str, Path]:
    """Source files by the name that they are imported by."""
    found = {}
    for folder in SOURCES.values():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported(module: str, source: str) -> set[str]:
    """Modules of the two packages that `module` imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: import by full names, not relative ones"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            found |= {text.value for text in node.args if isinstance(text, ast.Constant)}
    return {name for name in found if name.split(".")[0] in SOURCES}


def floor(module: str) -> tuple[str, int]:
    """The package of a module and the number of its floor."""
    package, room = module.split(".")[:2]
    return package, next(number for number, rooms in enumerate(FLOORS[package]) if room in rooms)


def is_entrance(module: str) -> bool:
    """Whether this is a package itself, which hands on names of its rooms, or `python -m`."""
    return module in SOURCES or module.endswith(".__main__")


def upward(module: str, source: str) -> list[str]:
    """What of a module's imports leads to a higher floor, or to another room on its own."""
    if is_entrance(module):
        return []
    wrong = []
    for other in sorted(imported(module, source)):
        if other in SOURCES:  # the operations' public names, for the program alone
            wrong += [other] if module.startswith(other) else []
            continue
        (package, mine), (others_package, its) = floor(module), floor(other)
        if package != others_package:
            wrong += [] if others_package == "cocomix_kernels" else [other]
        elif its > mine or (its == mine and module.split(".")[1] != other.split(".")[1]):
            wrong.append(other)
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    assert not upward(module, MODULES[module].read_text())


@pytest.mark.parametrize(
    "module, line",
    [
        ("cocomix.core.config", "from cocomix.data.documents import pieces"),
        ("cocomix.data.documents", "from cocomix.model.blocks import Block"),
        ("cocomix.training.trainer", "def f():\n    from cocomix.costs.planner import predict"),
        ("cocomix.training.trainer", "import cocomix.inference.evaluate"),
        ("cocomix.inference.loading", "from cocomix import cli"),
        ("cocomix.costs.planner", "from cocomix.inference import loading"),
        ("cocomix_kernels.common.dispatch", "from cocomix_kernels.attention import op"),
        ("cocomix_kernels.attention.op", "from cocomix_kernels import concept_mix"),
        ("cocomix_kernels.attention.op", "import importlib\nimportlib.import_module('cocomix.core.files')"),
        ("cocomix_kernels.attention.op", "from cocomix_kernels.lm_loss.cross_entropy import linear_cross_entropy"),
    ],
)
def test_an_upward_import_would_be_seen(module, line):
    assert upward(module, line)


def test_no_file_imports_itself_through_others():
    graph = {module: imported(module, file.read_text()) - {module} for module, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# --- tests mirror the code: a module's tests are in a file of its name in the room of the same name, or here

# Files beside `tests/`; several where each tests a part.
TESTED_IN = {
    "cocomix.data.token_streams": "engine/data/test_preparation.py engine/data/test_foreign_tokens.py",
    "cocomix.core.errors": "engine/test_cli.py",
    "cocomix.core.machine": "engine/costs/test_profiler.py",
    "cocomix.core.mapped_file": "engine/data/test_token_files.py engine/teacher/test_label_cache.py",
    "cocomix.core.methods": "engine/training/test_methods.py",
    "cocomix.costs.cluster": "engine/costs/test_planner.py",
    "cocomix.costs.footprint": "engine/costs/test_planner.py",
    "cocomix.costs.plan_text": "engine/costs/test_planner.py",
    "cocomix.costs.profile_inputs": "engine/costs/test_profiler.py",
    "cocomix.costs.profile_session": "engine/costs/test_profiler.py",
    "cocomix.costs.profile_text": "engine/costs/test_profiler.py",
    "cocomix.costs.profile_trace": "engine/costs/test_profiler.py",
    "cocomix.costs.step_parts": "engine/costs/test_profiler.py",
    "cocomix.distributed.background_write": "engine/distributed/test_checkpoint.py",
    "cocomix.model.blocks": "engine/model/test_model.py",
    "cocomix.model.config": "engine/model/test_model.py",
    "cocomix.model.positions": "engine/model/test_generation.py",
    "cocomix.report.figures": "engine/report/test_report.py",
    "cocomix.report.measurement_figures": "engine/report/test_measurements.py",
    "cocomix.report.measurement_page": "engine/report/test_measurements.py",
    "cocomix.report.page": "engine/report/test_report.py",
    "cocomix.report.runs": "engine/report/test_report.py",
    "cocomix.teacher.concept_labels": "engine/teacher/test_label_cache.py engine/teacher/test_supervision.py",
    "cocomix.teacher.extraction": "engine/teacher/test_label_cache.py",
    "cocomix.teacher.language_model": "engine/teacher/test_concept_teacher.py engine/teacher/test_families.py",
    "cocomix.teacher.sae_formats": "engine/teacher/test_sae.py",
    "cocomix.teacher.sae_metrics": "engine/teacher/test_sae_training.py",
    "cocomix.teacher.shard_cache": "engine/teacher/test_label_cache.py",
    "cocomix.teacher.soft_target_cache": "engine/teacher/test_distillation.py",
    "cocomix.teacher.soft_targets": "engine/teacher/test_distillation.py engine/teacher/test_supervision.py",
    "cocomix.teacher.supervision_kind": "engine/teacher/test_supervision.py",
    "cocomix_kernels.attention.eager": "kernels/attention/test_interleaved_attention.py",
    "cocomix_kernels.attention.op": "kernels/attention/test_interleaved_attention.py",
    "cocomix_kernels.attention.triton_kernel": "kernels/attention/test_triton_attention.py",
    "cocomix_kernels.attribution.eager": "kernels/attribution/test_attribution.py",
    "cocomix_kernels.attribution.op": "kernels/attribution/test_attribution.py",
    "cocomix_kernels.attribution.triton_kernel": "kernels/attribution/test_triton_attribution.py",
    "cocomix_kernels.common.checks": "kernels/common/test_dispatch.py kernels/concept_head/test_concept_head.py",
    "cocomix_kernels.lm_loss.head_losses": "kernels/lm_loss/test_linear_cross_entropy.py "
    "kernels/lm_loss/test_linear_distillation.py",
    "cocomix_kernels.common.chunking": "kernels/concept_head/test_concept_head.py engine/costs/test_planner.py",
    "cocomix_kernels.common.launch": "kernels/common/test_compile.py",
    "cocomix_kernels.common.recording": "kernels/common/test_compile.py kernels/common/test_dispatch.py",
    "cocomix_kernels.concept_head.eager": "kernels/concept_head/test_concept_head.py",
    "cocomix_kernels.concept_head.op": "kernels/concept_head/test_concept_head.py",
    "cocomix_kernels.concept_head.steps": "kernels/concept_head/test_concept_head.py",
    "cocomix_kernels.concept_head.triton_cross_entropy": "kernels/concept_head/test_triton_concept_head.py",
    "cocomix_kernels.concept_head.triton_kernel": "kernels/concept_head/test_triton_concept_head.py",
    "cocomix_kernels.concept_mix.eager": "kernels/concept_mix/test_concept_mix.py",
    "cocomix_kernels.concept_mix.op": "kernels/concept_mix/test_concept_mix.py",
    "cocomix_kernels.concept_mix.triton_kernel": "kernels/concept_mix/test_triton_mix.py",
    "cocomix_kernels.lm_loss.cross_entropy": "kernels/lm_loss/test_linear_cross_entropy.py",
    "cocomix_kernels.lm_loss.distillation": "kernels/lm_loss/test_linear_distillation.py",
    "cocomix_kernels.reference": "kernels/concept_head/test_concept_head.py kernels/concept_mix/test_concept_mix.py",
}


def mirror(module: str) -> Path:
    """Where the tests of a module should be."""
    package, *rooms, name = module.split(".")
    return ROOT / "tests" / SOURCES[package].parent.name / Path(*rooms, f"test_{name}.py")


def test_every_module_has_a_test_file_or_says_where_it_is_tested():
    found = {module for module, file in MODULES.items() if file.name not in ("__init__.py", "__main__.py")}
    missing = {module for module in found if not mirror(module).is_file()}
    assert sorted(missing - set(TESTED_IN)) == []
    assert sorted(set(TESTED_IN) - missing) == [], "these have a test file of their own, or are gone"
    for places in TESTED_IN.values():
        for place in places.split():
            assert (ROOT / "tests" / place).is_file(), place
