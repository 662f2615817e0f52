"""Model edits: changes of a loaded model, in place, before anything is checked or trained. One file each."""
