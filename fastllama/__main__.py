"""`python -m fastllama` is the same as `fastllama`."""

from fastllama.cli import main

if __name__ == "__main__":
    main(prog_name="fastllama")
