"""Saliency metrics, which score the importance of each weight; one file per metric."""
