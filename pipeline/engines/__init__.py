"""Engines that sample rollouts, one file each, behind the protocol in `base.py`."""
