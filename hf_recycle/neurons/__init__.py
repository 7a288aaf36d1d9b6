"""Where neurons live: the only code that knows layouts, storage and optimizer state."""
