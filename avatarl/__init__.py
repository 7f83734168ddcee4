"""The method (DESIGN section 3): action sets, rewards, losses, critics, and the objective that joins them."""
