"""Other implementations on the same weights, each in a process of its own.

`client.py` starts a peer and asks it for tokens; `worker.py` is the loop of the peer's process. `meta.py`,
`huggingface.py`, `torch_compile.py` and `gpt_fast.py` are the peers: a new one is one more such file and its entry in
`client.py`. `agreement.py` compares a peer's tokens and log-probabilities with ours.
"""
