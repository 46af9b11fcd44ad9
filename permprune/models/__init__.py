"""Reading models: checkpoints that are whole, and the classes they name."""
