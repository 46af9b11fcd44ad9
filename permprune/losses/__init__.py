"""Losses that searches and training minimise, and the tasks that give them predictions and targets."""
