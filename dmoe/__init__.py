"""dmoe: a dropless Mixture-of-Experts layer for PyTorch."""
