"""One trainer per stage."""
