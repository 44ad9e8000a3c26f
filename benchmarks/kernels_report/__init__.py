"""What the compiler makes of the kernels, for GPUs that are not here: `make kernels-report`.

`ahead_of_time.py` compiles without a GPU, `model_launches.py` makes every launch of real models' sizes.
`compiled_kernel.py` reads what came out: registers, spills, load widths, with `llvm_ir.py` and `sass.py` as parsers,
`dependence.py` for dependent launches and `weight_streaming.py` for how weights are read. `traffic.py` counts bytes in
the interpreter. `table.py` holds all of it to rules, and `markdown.py` and `report.py` write docs/compiled/.
"""
