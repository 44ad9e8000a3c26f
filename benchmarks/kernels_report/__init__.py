"""Compiles the kernels for GPUs that are not present and reports the result: `make kernels-report`.

`ahead_of_time.py` compiles without a GPU. `model_launches.py` makes every launch at the sizes of real models.
`compiled_kernel.py` reads registers, spills and load widths from a compiled kernel, with the parsers `llvm_ir.py` and
`sass.py`. `dependence.py` checks dependent launches, `weight_streaming.py` shows how weights are read, and `traffic.py`
counts bytes in the interpreter. `table.py` makes rows of all this and checks them against rules. `markdown.py` and
`report.py` write docs/compiled/.
"""
