"""Studies: each is a script that answers one question, `python -m bench.studies.NAME`."""
