"""Rewards: verifiers, the processes that run them, and shaping of scores."""
