"""The commands of `echomine`, by topic. Their heavy imports stand in the functions: `--help` is instant."""
