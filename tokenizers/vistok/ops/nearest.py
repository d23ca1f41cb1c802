"""Nearest code by squared Euclidean distance, tile by tile."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A tile of scores of 1 MiB stays in the second-level cache of a core; on a GPU larger tiles keep the device busy.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
# BLAS sums in another order for a handful of rows than for a full block, so a row would be quantized differently
# alone and in a batch. Padding to whole blocks of rows makes each row independent of its neighbours.
ROW_BLOCK = 16
MAX_TILE_CODES = 4096


@torch.no_grad()
def nearest_code(rows: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"]) -> Int[Tensor, " n"]:
    """Index of the code with the smallest squared Euclidean distance to each row; ties go to the lowest index.

    The distance is ``|e|^2 / 2 - z e`` (the term ``|z|^2`` does not depend on the code). The n x k matrix is never
    held: memory is O(n + k) plus one tile.

    Args:
        rows: float32. Rows that hold NaN get index 0.
        codebook: float32 table.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return _nearest_code(rows, codebook)


def _nearest_code(rows: Tensor, codebook: Tensor) -> Tensor:
    n, k = len(rows), len(codebook)
    half_norms = codebook.square().sum(-1).div_(2)
    code_tile = min(k, MAX_TILE_CODES)
    row_tile = max(ROW_BLOCK, TILE_ELEMENTS.get(rows.device.type, 2**24) // code_tile // ROW_BLOCK * ROW_BLOCK)
    padding = -n % ROW_BLOCK
    if padding:
        rows = torch.cat([rows, rows.new_zeros(padding, rows.shape[1])])
    indices = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), row_tile):
        part = rows[start : start + row_tile]
        best = part.new_full((len(part),), torch.inf)
        chosen = indices[start : start + row_tile]
        for first in range(0, k, code_tile):
            tile = torch.addmm(
                half_norms[first : first + code_tile], part, codebook[first : first + code_tile].T, alpha=-1
            )
            value, index = tile.min(-1)
            closer = value < best
            best = torch.where(closer, value, best)
            chosen.copy_(torch.where(closer, index + first, chosen))
    return indices[:n]
