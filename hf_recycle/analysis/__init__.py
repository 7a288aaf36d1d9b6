"""What can be learnt from a trained model's feed-forward neurons, and what can be taken away from them."""
