"""Data as a model's inputs: text in windows, and text, images and speech with what a model should say of them."""
