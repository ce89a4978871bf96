"""Where prompts come from: tasks, the tokenizer, grain pipelines."""
