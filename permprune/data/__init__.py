"""Datasets as model inputs: windows of text, and labelled texts, images and speech."""
