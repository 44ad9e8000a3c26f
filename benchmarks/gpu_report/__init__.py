"""One command that measures everything on a machine with a GPU: `make gpu-report`.

`report.py` runs the sections in another process and writes their results as they arrive. The sections are in
`sections.py`, `steps.py`, `variants.py` and `tests.py`, their sizes in `sizes.py`, two measuring kernels in
`probes.py`, and the summary in Markdown in `markdown.py`.
"""
