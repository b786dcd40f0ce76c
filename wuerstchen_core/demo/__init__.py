"""The demo models: their vocabulary, the drawings that they are trained on, and their weights."""
