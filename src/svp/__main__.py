"""`python -m svp` is `svp`."""

from svp.cli.main import main

if __name__ == "__main__":
    main()
