"""How fast training is, what each method costs, and what the machine could do: `python -m benchmarks`."""
