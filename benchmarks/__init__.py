"""What bench.py times: arms side by side and in turn, the tables they make, and the pages those are written to."""

PARTS = ("step", "loss", "generation", "growth", "precision", "kernels", "surgery")
"""Of `python bench.py`, in the order of its page."""
GPU_PARTS = {"tests": 80.0, "loss": 50.0, "char": 240.0, "large": 200.0}
"""Of `python bench.py --gpu`, with the seconds that each may take."""
