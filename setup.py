"""Adds to setup.cfg what that cannot say: experiments and task files go into the package."""

from setuptools import find_packages, setup

FOLDERS = {f"nrgpt_jax.bundled.{name}": name for name in ("experiments", "launch")}
setup(packages=[*find_packages(include=["nrgpt_jax*"]), *FOLDERS], package_dir=FOLDERS)
