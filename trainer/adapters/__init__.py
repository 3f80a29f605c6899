"""EchoClips in other people's trainers. Each module imports its own library, and nothing else here does."""
