"""Studies that compare runs; their figures stand in results/."""
