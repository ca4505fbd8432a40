"""`python -m openblip` is the command `openblip`."""

from openblip.cli import main

main()
