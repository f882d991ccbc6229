"""`python -m bench`: checks, timings, the model and static inspection (see docs/inspection.md)."""
