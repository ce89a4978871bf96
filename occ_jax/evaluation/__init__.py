"""What is made of an evaluation's answers: statistics, records on disk, tables."""
