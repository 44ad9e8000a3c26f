"""The suites of `fastllama bench`.

`interleaved.py` runs one case on ours and on the peers in turn. `decode.py`, `prefill.py` and `generate.py` compute
figures from such runs; `step_launches.py` times each launch of a decode step. `requests.py` has many requests in place
of one batch. `kernels.py` compares and times single ops, which `op_cases.py` describes. `load_and_memory.py` builds a
model in a fresh process.
"""
