"""How fast networks run: in full precision, simulated and on integers, side by side."""
