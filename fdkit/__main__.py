"""`fdkit`, `python -m fdkit` and `torchrun -m fdkit`: the command line as a program of its own."""

import signal

from fdkit.cli import main


def program() -> None:
    """Run the command line of this process, and end it."""
    try:
        main()
    finally:
        # Python and its libraries take a while to end. Ctrl-C then ends them at once, without their tracebacks.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    program()
