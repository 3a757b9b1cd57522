"""BatchNorm statistics, re-estimated with a live model."""
