"""`python -m deepkern`: what is installed and which backends it has here."""

import torch
import triton

import deepkern
from deepkern.runtime import backends, native

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(f"deepkern {deepkern.__version__}, torch {torch.__version__}, triton {triton.__version__}")
print(f"{len(deepkern.OPS)} ops on {device}:")
for name in backends.BACKENDS:
    reasons = {
        op: backends.unsupported_reason(described, name, device)
        for op, described in deepkern.OPS.items()
    }
    served = [op for op, reason in reasons.items() if reason is None]
    missing = sorted({reason for reason in reasons.values() if reason})
    print(f"  {name:7}{len(served):3} ops" + (f"  ({'; '.join(missing)})" if missing else ""))
if native.missing_reason():
    print(f"no native code: {native.missing_reason()}")
