"""Lets Liger's Triton kernels run in Triton's interpreter, on a CPU: slow, but the same code as on a GPU.

TRITON_INTERPRET=1 must be in the environment before `triton` is imported. Two things are missing in the interpreter
(seen with Triton 3.4 to 3.9, Liger 0.8): numbers given to a kernel stay Python floats, which have no `.to`; and
functions of libdevice do nothing.
"""

import importlib
import os
from typing import Any


def prepare() -> None:
    """Fill in what the interpreter lacks.

    Raises:
        RuntimeError: TRITON_INTERPRET is not set.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def convert(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return plain(value)

    interpreter._implicit_cvt = convert
    # Not an import statement: the package has a function of this name. A lambda: the interpreter changes `tl` while a
    # kernel runs.
    importlib.import_module("liger_kernel.ops.rms_norm").rsqrt = lambda value: tl.rsqrt(value)
