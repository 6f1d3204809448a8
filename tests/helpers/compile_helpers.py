"""Ahead-of-time compilation of the launches that dispatch chooses, without a GPU: registers, spills, shared memory.

    python tests/helpers/compile_helpers.py [--chips 80 90 100] [--modules aot_sparse ...] [--json FILE]

Prints a table, one line a kernel binary. A process that interprets kernels cannot compile them, so the test runs this
one. Each `aot_*` module yields the launches of some operations.
"""

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = ("aot_linear_topk", "aot_sparse", "aot_attention")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA|QGMMA)")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def as_source(launch) -> ASTSource:
    """What the JIT would compile for these arguments: aligned pointers, sizes that are 1 or divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    positional = iter(launch.arguments)
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name], constants[(position,)] = "constexpr", launch.constants[name]
            continue
        value = next(positional)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
            continue
        if torch.is_tensor(value):
            signature[name], aligned = POINTERS[value.dtype], True
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    assert next(positional, None) is None, f"{launch.kernel.__name__} got too many arguments"
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch, chip: int) -> dict:
    """Registers a thread, spilled and shared bytes, tensor-core instructions or not; chip is 80, 90 or 100."""
    source, options = as_source(launch), {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
        code = _output(tools / "cuobjdump", "--dump-sass", cubin.name)
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    types = {name: kind for name, kind in source.signature.items() if kind.startswith("*")}
    return {
        "kernel": launch.kernel.__name__, "chip": chip, "num_warps": launch.num_warps, "registers": registers,
        "stack_bytes": stack, "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared_bytes": compiled.metadata.shared, "has_product": "tt.dot" in compiled.asm["ttir"],
        "tensor_cores": bool(TENSOR_CORE.search(code)), "types": types,
        "constants": {name: str(value) for name, value in launch.constants.items()},
    }  # fmt: skip


def _output(*command):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def unique(launches) -> list:
    """One launch for each distinct binary, its tensors without their memory."""
    found = {}
    for one in launches:
        key = as_source(one).hash(), one.num_warps, one.num_stages
        if key not in found:
            light = (a.to("meta") if torch.is_tensor(a) else a for a in one.arguments)
            found[key] = dataclasses.replace(one, arguments=tuple(light))
    return list(found.values())


def compile_all(chips, modules) -> list[dict]:
    """`compile_launch` of every distinct launch of these modules, on all cores."""
    torch.set_num_threads(1)  # recording computes products, and threads do not survive the fork below
    jobs = []
    for chip in chips:
        for module in map(importlib.import_module, modules):
            jobs += [(launch, chip) for launch in unique(module.launches(divmod(chip, 10)))]
    global _jobs
    _jobs = jobs  # launches hold functions that cannot be pickled: the forked workers inherit them
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(_compile_job, range(len(jobs)), chunksize=1)


def _compile_job(number):
    return compile_launch(*_jobs[number])


def table(rows) -> str:
    """One line for each kernel, chip and set of pointer types, over all its configurations."""
    lines = [f"{'kernel':28}{'chip':>6}{'binaries':>10}{'warps':>8}{'registers':>11}{'spills':>8}{'shared KiB':>12}"
             f"{'tensor cores':>14}"]  # fmt: skip
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["chip"]), []).append(row)
    for (kernel, chip), members in sorted(groups.items()):
        warps, registers = (_span(row[key] for row in members) for key in ("num_warps", "registers"))
        spills = sum(row["local_accesses"] + row["stack_bytes"] for row in members)
        shared = max(row["shared_bytes"] for row in members) / 1024
        cores = (
            ""
            if not any(row["has_product"] for row in members)
            else "yes"
            if any(row["tensor_cores"] for row in members)
            else "NO"
        )
        lines.append(f"{kernel:28}{chip:>6}{len(members):>10}{warps:>8}{registers:>11}{spills:>8}{shared:>12.1f}"
                     f"{cores:>14}")  # fmt: skip
    return "\n".join(lines)


def _span(values):
    values = sorted(values)
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def main() -> None:
    """Compile, print the table, and keep the rows where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, nargs="+", default=list(SHARED_LIMIT))
    parser.add_argument("--modules", nargs="+", default=MODULES)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = compile_all(options.chips, options.modules)
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
