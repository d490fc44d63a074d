"""`python -m cascade` is the command `cascade`."""

from cascade.cli import main

main()
