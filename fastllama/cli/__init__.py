"""The command line: `fastllama complete`, `chat`, `inspect` and `bench`.

Each command lives in a file of its own and imports the runtime, and with it torch, only once it runs, so that `--help`
answers at once. Errors that a user can cause end in one line on stderr and exit code 2; Ctrl-C ends in 130.
"""

from fastllama.cli.program import program as main

__all__ = ["main"]
