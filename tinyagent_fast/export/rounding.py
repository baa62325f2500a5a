"""float32 to the number formats that weights are stored in: the one place where values round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class OverflowInF16(ValueError):
    """A finite value is too large for f16; `largest` is its magnitude."""

    def __init__(self, largest: float) -> None:
        """Keep the largest magnitude for the message that names the tensor."""
        self.largest = largest
        super().__init__(f"{largest:g} is beyond the largest f16 number, 65504")


def encode_values(block: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round float32 values to a stored format, to the nearest with ties to even.

    Args:
        block: Values.
        dtype: F32, F16 or BF16.

    Returns:
        An array of the same shape whose bytes are the stored ones.

    Raises:
        OverflowInF16: A finite value would become infinite.
    """
    import numpy as np

    if dtype == "F32":
        return np.ascontiguousarray(block, "<f4")
    if dtype == "F16":
        with np.errstate(over="ignore"):
            rounded = block.astype("<f2")
        if not np.isfinite(rounded).all() and np.isfinite(block).all():
            raise OverflowInF16(float(np.abs(block).max()))
        return np.ascontiguousarray(rounded)
    assert dtype == "BF16", dtype
    bits = np.ascontiguousarray(block, np.float32).view(np.uint32)
    # Half a step less one, plus one where the kept part is odd: nearest, ties to even.
    rounded_up = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # The sum would carry a NaN into infinity; a NaN keeps its upper half, made a quiet one.
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded_up).astype("<u2")
