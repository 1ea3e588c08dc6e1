"""Metadata lives in pyproject.toml; this file is where compiled modules get built."""

from setuptools import setup

setup()
