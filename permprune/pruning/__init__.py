"""The stored form of pruned models: what lies in their folders, and what is kept on the models themselves."""
