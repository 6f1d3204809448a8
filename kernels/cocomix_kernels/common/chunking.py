"""How many rows of a wide matrix are held at once."""

import torch

# Below the promised bounds of 256 MiB on a CPU, where a chunk near the cache's size is faster, and of 512 MiB on a GPU.
# There PyTorch's selection needs room for candidates; the Triton kernels need little beside the chunk, and the products
# over it want as many rows as there may be.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 384 * 2**20, "triton": 500 * 2**20}
_TILE_ROWS = 128  # of a product


def chunk_rows(n_rows: int, bytes_per_row: int, device: torch.device, backend: str = "torch") -> int:
    """Rows in a chunk such that its buffers stay within the budget of the device and backend (at least one row).

    Chunks come out nearly equal, in whole tiles of a product where the budget holds one.
    """
    budget = CHUNK_BYTES["triton" if backend == "triton" else device.type if device.type == "cpu" else "cuda"]
    largest = max(1, budget // max(1, bytes_per_row))
    if n_rows <= largest:
        return max(1, n_rows)
    tile = _TILE_ROWS if largest >= _TILE_ROWS else 1
    largest = largest // tile * tile
    n_chunks = -(-n_rows // largest)
    return -(-n_rows // (n_chunks * tile)) * tile


def row_chunks(n_rows: int, bytes_per_row: int, device: torch.device, backend: str = "torch") -> list[slice]:
    """Slices that cover `n_rows` rows in chunks of `chunk_rows`."""
    rows = chunk_rows(n_rows, bytes_per_row, device, backend)
    return [slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
