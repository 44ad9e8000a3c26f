"""The pictures of docs/kernels.md and docs/engine.md, drawn as SVG with the standard library alone.

Every figure in them is computed from the code: bytes from `speed_of_light.py`, tiles and splits from the kernels' own
launch tables. A test compares the committed files with what this package draws.
"""
