"""What a trained model is worth: losses of texts by a protocol, answers to a task, and which of two is better."""
