"""What pyproject.toml cannot say: a wheel carries the folder recipes/ as longtrain/recipes/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["longtrain*"]), "longtrain.recipes"],
    package_dir={"longtrain.recipes": "recipes"},
    package_data={"longtrain.recipes": ["*.yaml"]},
)
