"""`python -m lconvert`."""

from lconvert.cli import main

if __name__ == "__main__":
    main()
