"""OpenAI's API without HTTP: bodies of requests → the engine's requests, and results → bodies of responses.

`fields.py` lists the fields of a body, `requests.py` translates it and submits it to an engine, `responses.py` and
`logprobs.py` write the answer. Batches use it, and so can a server.
"""
