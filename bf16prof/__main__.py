"""`python -m bf16prof` is the same program as `bf16prof`."""

from bf16prof.cli import main

if __name__ == "__main__":
    main()
