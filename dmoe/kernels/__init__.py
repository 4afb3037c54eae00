"""@triton.jit bodies and their launch shapes, one file per operation, named as in ``dmoe/ops``."""
