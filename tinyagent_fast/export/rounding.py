"""float32 to the number formats that weights are stored in: the one place where values round."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Numbers from here on are nearer to 2**16 than to 65504, and 2**16 is f16's infinity.
_INFINITE_F16 = 65520.0


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
        largest = _largest_finite(block)
        if largest >= _INFINITE_F16:
            raise OverflowInF16(largest)
        return np.ascontiguousarray(block.astype("<f2"))
    assert dtype == "BF16", dtype
    bits = np.ascontiguousarray(block, np.float32).view(np.uint32)
    # Half a step less one, plus one where the kept part is odd: nearest, ties to even.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nans = np.isnan(block)
    if nans.any():
        # The sum carried NaNs into infinity; a NaN keeps its upper half, made a quiet one.
        rounded[nans] = (bits[nans] >> 16) | 0x40
    return rounded.astype("<u2")


def _largest_finite(block: NDArray[np.float32]) -> float:
    import numpy as np

    if not block.size:
        return 0.0
    largest = max(-float(block.min()), float(block.max()))
    if not math.isfinite(largest):
        largest = float(np.abs(block[np.isfinite(block)]).max(initial=0.0))
    return largest


def count_zeros(stored: NDArray[Any]) -> int:
    """Count zeros of both signs, fast for 16-bit numbers, which numpy counts one by one.

    Args:
        stored: Values as `encode_values` gives them.

    Returns:
        How many are zero.
    """
    import numpy as np

    bits = stored.view(np.uint32 if stored.itemsize == 4 else np.uint16)
    return int(stored.size - np.count_nonzero(bits << 1))
