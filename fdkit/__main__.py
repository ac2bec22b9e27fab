"""`python -m fdkit`, and `torchrun -m fdkit`: the command line where a module is asked for."""

from fdkit.cli import main

if __name__ == "__main__":
    main()
