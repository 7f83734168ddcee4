"""Learning from nothing (DESIGN section 8): n-gram statistics, curriculum and health, rollouts, rewards, objective."""
