"""One command that measures everything on a machine with a GPU: `make gpu-report`.

`report.py` runs the sections in a process of their own and writes what they find as it comes. The sections are in
`sections.py`, `steps.py`, `variants.py` and `tests.py`, their sizes in `sizes.py`, two measuring kernels in
`probes.py`, and the page for people in `markdown.py`.
"""
