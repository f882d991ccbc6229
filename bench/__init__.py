"""`python -m bench`: checks, timings, the model and static inspection (see docs/inspection.md)."""

import os

# Without this, OpenMP threads that wait for each other spin for milliseconds and not microseconds:
# next to other work on the machine a run took ten times as long. torch reads it when imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
