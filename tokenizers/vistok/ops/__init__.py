"""The numerics under the quantizers."""

from vistok.ops.binary_entropy import batch_entropy, sample_entropy
from vistok.ops.bits import pack_bits, unpack_bits
from vistok.ops.clusters import closest_rows, code_sums, kmeans, random_rows
from vistok.ops.nearest import nearest_code, nearest_codes
from vistok.ops.sinkhorn import sinkhorn_code
from vistok.ops.soft import SoftCodes, soft_assignment, soft_codes, soft_one_hot

__all__ = [
    "SoftCodes",
    "batch_entropy",
    "closest_rows",
    "code_sums",
    "kmeans",
    "nearest_code",
    "nearest_codes",
    "pack_bits",
    "random_rows",
    "sample_entropy",
    "sinkhorn_code",
    "soft_assignment",
    "soft_codes",
    "soft_one_hot",
    "unpack_bits",
]
