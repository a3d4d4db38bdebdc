"""Recipes: strict YAML files to frozen settings of a training run."""
