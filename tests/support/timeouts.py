"""How long a test waits for another process: long enough for a busy machine, so only a hang reaches it."""

HANG_SECONDS = 300.0
