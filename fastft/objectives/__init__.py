"""Objectives: how the loss is taken from a model, and wrappers around a task's own that any task may use. One file
each.
"""
