"""Names the types of numpy arrays. Letters at the end of a name say what its axes count. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]
IdArray = NDArray[np.int16]         # expert ids and ranks, as they travel
