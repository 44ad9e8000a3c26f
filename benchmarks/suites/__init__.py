"""The suites of `fastllama bench`: what is timed.

`comparison.py` runs a case on ours and on the peers in turn. `decode.py`, `prefill.py` and `generate.py` turn such runs
into figures, and `step_launches.py` times each launch of a decode step. `kernels.py` times single ops, which
`op_cases.py` describes. `load_and_memory.py` builds a model in a fresh process.
"""
