"""Edits of attention weights by a second agent: theatre, operation, batched evaluation (DESIGN section 9)."""
