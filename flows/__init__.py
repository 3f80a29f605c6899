"""Prefect flows, the tasks they are made of, and the command line."""
