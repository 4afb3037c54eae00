"""Hugging Face Transformers on dmoe: every MoE model by one word, and whole blocks with expert parallelism."""
