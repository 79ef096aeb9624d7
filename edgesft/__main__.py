"""`python -m edgesft`."""

from edgesft.cli import main

if __name__ == "__main__":
    main()
