"""The engine of requests: any number of prompts at once, in rows that join and leave a running batch.

A request's way: `any_engine.py` (submit) → `prompts.py` (checks) → `engine.py` (threads) → `inbox.py` → `scheduler.py`
(which sequences run, on which pages) → `core.py` (the loop; `recovery.py` after errors) → `model_runner.py` (chunks of
prompts, decode steps) → `sequence.py` (tokens to text, `stop_strings.py`) → `request.py` (the handle, with the answers
as they come). `sampling_params.py` says what a request may ask for. From another process requests come through
`remote_engine.py` and `engine_host.py`.
"""

from fastllama.engine.engine import Engine
from fastllama.engine.grammar import Grammar
from fastllama.engine.prompts import Prompt
from fastllama.engine.request import Answer, Request, Result
from fastllama.engine.sampling_params import SamplingParams
from fastllama.engine.sequence import Increment
from fastllama.engine.stats import Stats

__all__ = ["Answer", "Engine", "Grammar", "Increment", "Prompt", "Request", "Result", "SamplingParams", "Stats"]
