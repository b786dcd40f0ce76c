"""Würstchen in plain PyTorch: three stages from text to picture (arXiv 2306.00637)."""
