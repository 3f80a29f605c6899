"""The trainer: objectives, batches, checkpoints and the loop. Knows the pipeline, not the flows."""
