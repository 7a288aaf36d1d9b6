"""How fast training is, against the stock Trainer and against what the machine can do."""
