"""Dumps into the lake: `core` reads, stages and commits them; the others check and complete their rows."""
