"""Adds to setup.cfg what that cannot say: experiments go into the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nrgpt_jax*"]), "nrgpt_jax.bundled.experiments"],
    package_dir={"nrgpt_jax.bundled.experiments": "experiments"},
)
