"""How many rows of a wide matrix are held at once."""

import torch

# Below the promised bounds of 256 MiB on a CPU, where a chunk near the cache's size is faster, and of 512 MiB on a GPU,
# where the rest is room for the selection's candidates.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 384 * 2**20}


def chunk_rows(n_rows: int, bytes_per_row: int, device: torch.device) -> int:
    """Rows in a chunk such that its buffers stay within the device's budget (at least one row)."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(1, min(n_rows, budget // max(1, bytes_per_row)))


def row_chunks(n_rows: int, bytes_per_row: int, device: torch.device) -> list[slice]:
    """Slices that cover `n_rows` rows in chunks of `chunk_rows`."""
    rows = chunk_rows(n_rows, bytes_per_row, device)
    return [slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
