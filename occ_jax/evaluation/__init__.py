"""Evaluation of policies: sampling and judging answers, records on disk, statistics, tables."""
