"""The small demo model's world: its vocabulary, its pictures and a judge for them."""
