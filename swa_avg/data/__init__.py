"""Rows and batches of data for refreshing and scoring. Nothing here imports Keras."""
