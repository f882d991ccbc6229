"""The oracle: every op again, under its own name and signature, in plain PyTorch.

Casts, routing and permutations are bitwise what the kernels must give; matmuls and attention are
computed in float64 on the same (quantised) inputs. Written to be read, not to be fast.
"""

from .attention import *  # noqa: F403
from .experts import *  # noqa: F403
from .matmul import *  # noqa: F403
from .quant import *  # noqa: F403
