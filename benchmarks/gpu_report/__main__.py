"""`python -m fastllama.benchmarks.gpu_report`."""

import sys

from fastllama.benchmarks.gpu_report.report import main

if __name__ == "__main__":
    sys.exit(main())
