"""How good a policy is: answers sampled and judged, statistics, records on disk, tables."""
