"""One command that measures everything on a machine with a GPU: `make gpu-report`.

`report.py` runs the sections in another process and writes their results as they arrive. The sections are in
`measurements.py`, `whole_steps.py`, `many_requests.py`, `instruction_rates.py`, `launch_search.py` and `run_tests.py`,
those about quantised weights in `quantized_*.py`, their sizes in `sizes.py`, two measuring kernels in `probes.py`, and
the summary in Markdown in `markdown.py`.
"""
