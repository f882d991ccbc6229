"""The reference: every op in plain PyTorch, under the same name and signature.

Casts, routing and permutations must equal the kernels bit for bit. Matmuls and attention are
computed in float64 on the same (quantized) inputs. The code is written for clarity, not speed.
"""

from .attention import *  # noqa: F403
from .experts import *  # noqa: F403
from .matmul import *  # noqa: F403
from .quant import *  # noqa: F403
