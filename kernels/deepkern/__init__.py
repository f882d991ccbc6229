"""deepkern: kernels for FP8 matmul, latent attention and expert dispatch, as torch ops.

Importing it registers `torch.ops.deepkern.*`. `deepkern.X` is the public function of op X
(autograd included), `torch.ops.deepkern.X` the op under it, `deepkern.reference.X` its oracle.
"""

from .runtime import interpreter

interpreter.install()  # does nothing unless TRITON_INTERPRET=1

from . import experts, reference  # noqa: E402
from .attention import *  # noqa: E402, F403
from .experts import *  # noqa: E402, F403
from .matmul import *  # noqa: E402, F403
from .matmul import FP8Linear, fp8_linear  # noqa: E402
from .quant import *  # noqa: E402, F403
from .runtime.backends import BackendError, backend, explain  # noqa: E402
from .runtime.op import OPS  # noqa: E402

__version__ = "0.1.0"
__all__ = ["BackendError", "FP8Linear", "backend", "explain", "fp8_linear", "reference", *OPS]
__all__ += [name for name in experts.__all__ if name not in OPS]
