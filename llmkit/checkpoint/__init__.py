"""Checkpoints in and out: mapped files, the hub, loading and saving. Import the modules; this one stays free of torch."""
