"""Prompts: digit tasks, prepared sets, tokenizers and grain pipelines."""
