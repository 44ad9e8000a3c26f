"""The server: OpenAI's API over HTTP, on an engine.

A request's way: `guards.py` (API key, limits) → `generation_routes.py` (reads the body) → `service.py` (admits it,
submits it to the engine) → `streaming.py` (server-sent events, clients that go away). `errors.py` gives every error
OpenAI's shape, `metrics.py` counts, `run.py` starts and stops all of it. What bodies mean stands in `openai_api/`.
"""
