"""Other implementations on the same weights, each in a process of its own.

`registry.py` lists the peers and starts them. `meta.py`, `huggingface.py`, `huggingface_batching.py`,
`torch_compile.py`, `gpt_fast.py`, `llama_cpp.py` and `vllm_cpu.py` are the peers, and `worker.py` has what their
processes share. `gguf_file.py` writes weights for llama.cpp. A new peer is one more such file, with an entry in
`registry.py`.
`agreement.py` compares a peer's tokens and log-probabilities with ours.
"""
