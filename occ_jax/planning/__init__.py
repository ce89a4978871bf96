"""Plans: the programs of a run compiled ahead of time for a machine, to see whether they fit it."""
