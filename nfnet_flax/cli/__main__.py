"""`python -m nfnet_flax.cli` is `nfnet`."""

from nfnet_flax.cli import program

if __name__ == "__main__":
    program()
