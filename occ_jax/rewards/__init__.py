"""Rewards: how completions are scored, and what becomes of the scores."""
