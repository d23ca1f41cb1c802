"""The numerics under the quantizers."""

from vistok.ops.nearest import nearest_code

__all__ = ["nearest_code"]
