"""EchoMine's library: from prompts to rollouts, from rollouts to EchoClips, from clips to shards."""
