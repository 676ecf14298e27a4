"""The commands of python -m regfast, a module each."""
