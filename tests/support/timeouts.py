"""How long a test waits for another process. Only one that hangs takes as long, however busy the machine is."""

HANG_SECONDS = 300.0
