"""deepkern: kernels for FP8 matmul, latent attention and expert dispatch, as torch ops.

`deepkern.X` is the public function of op X (autograd included), `torch.ops.deepkern.X` the op under
it, `deepkern.reference.X` its oracle.

`import deepkern` costs little more than `import torch`. The first use of `deepkern.X` or
`torch.ops.deepkern.X` loads the ops, and Triton with them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

from .runtime.op import install_lazy_ops

if TYPE_CHECKING:
    from ._api import *  # noqa: F403
    from ._api import __all__ as __all__

__version__ = "0.1.0"

if os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import install

    install()  # before the first kernel is defined


def _load_api() -> dict[str, object]:
    """Imports every op and publishes the public names here."""
    api = importlib.import_module("._api", __name__)
    names = {name: getattr(api, name) for name in api.__all__}
    globals().update(names, __all__=api.__all__)
    return names


def __getattr__(name: str) -> object:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.isidentifier() and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    _load_api()
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_load_api()})


install_lazy_ops(_load_api)
