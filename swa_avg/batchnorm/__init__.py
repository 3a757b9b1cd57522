"""BatchNorm statistics for averaged weights: moments (pure), data (arrays, streamed), refresh (Keras)."""
