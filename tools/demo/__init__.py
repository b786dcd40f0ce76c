"""How the shipped model is made, measured and shown."""
