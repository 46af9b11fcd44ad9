"""The program: `permprune`, or `python -m permprune`."""

from __future__ import annotations

from permprune.system.failures import leaving_on_interrupt


def main() -> None:
    """Run the command line; a command itself may be interrupted (`interruptible`)."""
    with leaving_on_interrupt():
        from permprune.cli import app

        app()


if __name__ == "__main__":
    main()
