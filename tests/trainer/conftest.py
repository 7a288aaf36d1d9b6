from tiny_runs import arguments, tokenizer, train

__all__ = ["arguments", "tokenizer", "train"]
