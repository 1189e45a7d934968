"""`python -m fuser`: the command line, also where another program is called `fuser`."""

from fuser.cli import main

if __name__ == "__main__":
    main()
