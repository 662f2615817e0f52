"""Observers: what watches a run and may stop it, save it or have it evaluated. One file each."""
