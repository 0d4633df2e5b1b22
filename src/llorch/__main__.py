"""`python -m llorch` is `llorch`."""

from llorch.cli.main import main

if __name__ == "__main__":
    main()
