"""What a model is trained and searched on: targets, and the losses made of them."""
