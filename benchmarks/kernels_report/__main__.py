"""`python -m fastllama.benchmarks.kernels_report`."""

from fastllama.benchmarks.kernels_report.report import main

if __name__ == "__main__":
    main()
