"""The audit of a training's dumps: its figures in `core`, the rules of other trainers, and its page."""
