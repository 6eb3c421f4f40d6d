"""Recipes: configurations and small tasks that run as they stand."""
