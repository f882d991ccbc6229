"""The HTTP server behind `python -m model.serve`.

worker.py    the thread that owns the engine, and queues between it and asyncio
protocol.py  JSON of OpenAI's API -> prompts and `Sampling`, and errors in OpenAI's shape
answers.py   updates of the engine -> JSON of OpenAI's API, whole or in pieces
metrics.py   counters and histograms in Prometheus' text format
app.py       the routes
"""
