"""Ahead-of-time compilation of the launches that dispatch chooses, without a GPU: registers, spills, shared memory.

    python tests/compile_helpers.py 80 90 100      # prints one JSON line a kernel and chip

It runs in a process of its own, because a process that interprets kernels cannot compile them.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA|QGMMA)")
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.int16: "*i16", torch.uint8: "*u8", torch.bool: "*i1",
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
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(as_source(launch), target=GPUTarget("cuda", chip, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
        code = _output(tools / "cuobjdump", "--dump-sass", cubin.name)
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    return {
        "kernel": launch.kernel.__name__, "chip": chip, "registers": registers, "stack_bytes": stack,
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", code)), "shared_bytes": compiled.metadata.shared,
        "tensor_cores": bool(TENSOR_CORE.search(code)), "num_warps": launch.num_warps,
        "constants": {name: str(value) for name, value in launch.constants.items()},
    }


def _output(*command):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def unique(launches) -> list:
    """One launch for each distinct binary."""
    return list({repr((as_source(one).hash(), one.num_warps, one.num_stages)): one for one in launches}.values())
