"""Argument checks that all operations share: shapes by named dimensions, dtypes and devices."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # wider unsigned ones lack operators


def check_shapes(operation: str, **arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Check tensors against shapes written as dimension letters and return the letters' sizes.

    `arguments` maps a name to `(tensor, "N d")`; a letter must have one size throughout, a number must be met
    exactly. Raises `ValueError` that names the operation, the argument, its shape and what was expected.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters) in arguments.items():
        expected = letters.split()
        shape = tuple(tensor.shape)
        fits = len(shape) == len(expected) and all(
            size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
            for letter, size in zip(expected, shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{letter}={size}" for letter, size in sizes.items() if letter in expected)
            raise ValueError(
                f"{operation}: {name} has shape {list(shape)}, expected [{', '.join(expected)}]"
                + (f" with {known}" if known else "")
            )
    return sizes


def check_same(operation: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors are floating point, of one dtype and on one device."""
    (first_name, first), *others = tensors.items()
    check_floats(operation, **{first_name: first})
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{operation}: {name} has dtype {tensor.dtype} but {first_name} has {first.dtype}; cast one of them"
            )
    check_device(operation, **tensors)


def check_floats(operation: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors are floating point."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{operation}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")


def check_device(operation: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors are on one device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device} but {first_name} is on {first.device}")


def check_integers(operation: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors are of one of the dtypes in `INTEGERS`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in INTEGERS:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGERS)
            raise ValueError(f"{operation}: {name} has dtype {tensor.dtype}, expected one of {expected}")


def check_range(operation: str, name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise `ValueError` unless low <= tensor < high. On a GPU the check would stall the stream, so it is left out."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = (int(v) for v in torch.aminmax(tensor))
    if smallest < low or largest >= high:
        raise ValueError(f"{operation}: {name} holds values from {smallest} to {largest}, expected {low} to {high - 1}")


def check_k(operation: str, k: int, width: int, name: str = "k") -> None:
    """Raise `ValueError` unless 1 <= k <= width."""
    if not 1 <= k <= width:
        raise ValueError(f"{operation}: {name} is {k}, expected 1 to {width}")
