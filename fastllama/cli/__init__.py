"""The command line: `fastllama complete`, `chat`, `batch`, `inspect`, `quantize` and `bench`.

Each command has its own file and imports the runtime, and with it torch, only when it runs, so that `--help` is fast.
An error that a user can cause is one line on stderr and exit code 2. Ctrl-C exits with 130.
"""

from fastllama.cli.program import program as main

__all__ = ["main"]
