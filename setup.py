"""What pyproject.toml cannot say: packages are found, and `export/` is called jql_export once it is installed."""

from setuptools import find_packages, setup

EXPORT = [name.replace("export", "jql_export", 1) for name in find_packages(include=["export", "export.*"])]
setup(packages=[*find_packages(include=["jql_engine", "jql_engine.*"]), *EXPORT])
