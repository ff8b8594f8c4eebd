"""`python -m swquant` is the command line."""

from swquant.cli import main

main()
