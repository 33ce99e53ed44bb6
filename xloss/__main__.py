"""``python -m xloss`` is the ``xloss`` command."""

from xloss.cli import main

if __name__ == "__main__":
    main()
