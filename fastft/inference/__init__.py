"""Predictions from trained models."""
