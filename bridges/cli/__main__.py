"""``python -m shardproof.bridges.cli``: what ``torchrun -m`` starts."""

from . import main

if __name__ == "__main__":
    main()
