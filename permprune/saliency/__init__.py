"""Saliency: how much each weight matters, one file a metric."""
