"""Analysis of compiled training steps, and planning for devices that are not available."""
