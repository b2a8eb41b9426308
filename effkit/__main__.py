"""python -m effkit: the same commands, whatever folder the environment's scripts are in."""

from effkit.cli import main

main()
