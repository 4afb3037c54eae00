"""What the benchmarks are made of; each script one folder above answers one question."""
