"""What a run will cost, before it starts: counted, measured on a few steps, and said for other machines."""
